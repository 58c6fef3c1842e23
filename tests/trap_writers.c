/* Writers of test memory that know nothing of Python: they are caught in the kernel, for as long as it takes. */
#include <stdint.h>

enum { PAGE = 4096 };

/* Adds 1 to a word of a page picked at random, again and again, until *stop. Returns how often. */
uint64_t hammer(uint8_t *memory, uint64_t pages, uint64_t seed, const volatile uint64_t *stop)
{
    uint64_t state = seed * 2 + 1, count = 0;
    while (!*stop) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        volatile uint64_t *word = (volatile uint64_t *)(memory + (state >> 33) % pages * PAGE) + (state >> 20) % 512;
        *word += 1;
        count++;
    }
    return count;
}

/* Writes `value` to the last byte of every page, in order, `step` pages apart. */
void sweep(uint8_t *memory, uint64_t pages, uint64_t step, uint8_t value)
{
    for (uint64_t page = 0; page < pages; page += step)
        *(volatile uint8_t *)(memory + page * PAGE + PAGE - 1) = value;
}

/* What a vhost-user backend does after it wrote a page: sets the page's bit, a byte at a time. */
void log_page(uint8_t *log, uint64_t address)
{
    const uint64_t page = address / PAGE;
    __atomic_fetch_or(&log[page / 8], (uint8_t)(1u << (page % 8)), __ATOMIC_SEQ_CST);
}

/* Adds 1 to a word of random pages and logs each afterwards, until *stop: data first, then its bit. */
uint64_t hammer_and_log(uint8_t *memory, uint64_t pages, uint64_t seed, const volatile uint64_t *stop, uint8_t *log,
                        uint64_t address)
{
    uint64_t state = seed * 2 + 1, count = 0;
    while (!*stop) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const uint64_t page = (state >> 33) % pages;
        *((volatile uint64_t *)(memory + page * PAGE) + (state >> 20) % 512) += 1;
        log_page(log, address + page * PAGE);
        count++;
    }
    return count;
}
