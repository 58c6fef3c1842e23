/* Answers of a script before the kernel's, for a build of the ioctl module with -DPAGECORE_INJECT (tests/injection.py).
 *
 * Either a list of answers, one a call, or a generator with a seed. An answer is (errno, pages, out): `pages` of the call
 * are really done first, and `out` is what the last field then says, KEEP what the caller left there. Only calls that
 * place are touched; each counts.
 */
#include <errno.h>
#include <linux/ioctl.h>
#include <linux/types.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/ioctl.h>

#define KEEP INT64_MIN

struct answer {
    int64_t number, pages, out;
};

static const struct answer *answers;
static size_t used, given;
static uint64_t seed, page_size = 4096;
static unsigned rate; /* of 1000 calls that the generator answers */
static uint64_t calls, injected;

void script(const struct answer *list, size_t count)
{
    answers = list;
    given = count;
    used = 0;
    rate = 0;
}

void generate(uint64_t start, unsigned per_thousand, uint64_t size)
{
    answers = 0;
    given = used = 0;
    seed = start;
    rate = per_thousand;
    page_size = size;
}

uint64_t count_calls(void) { return calls; }
uint64_t count_injected(void) { return injected; }

static uint64_t draw(uint64_t bound)
{
    seed += 0x9E3779B97F4A7C15u;
    uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) % bound;
}

/* Where the length and the last field of a request stand: COPY and MOVE have two addresses, the others one. */
static int layout(unsigned long request, uint64_t **length, int64_t **out, void *argument)
{
    uint64_t *words = argument;
    switch (_IOC_NR(request)) {
    case 0x03: /* COPY */
    case 0x05: /* MOVE */
        *length = &words[2];
        *out = (int64_t *)&words[4];
        return 1;
    case 0x04: /* ZEROPAGE */
    case 0x07: /* CONTINUE */
    case 0x08: /* POISON */
        *length = &words[1];
        *out = (int64_t *)&words[3];
        return 1;
    }
    return 0;
}

int answer(int fd, unsigned long request, void *argument)
{
    uint64_t *length;
    int64_t *out;
    struct answer now = {0, 0, KEEP};
    if (!layout(request, &length, &out, argument))
        return ioctl(fd, request, argument);
    __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
    uint64_t pages = *length / page_size;
    if (used < given) {
        now = answers[used++];
    } else if (rate && draw(1000) < rate) {
        static const int numbers[] = {EAGAIN, EAGAIN, EAGAIN, EEXIST, ENOMEM, EINTR};
        now.number = numbers[draw(6)];
        if (now.number == EAGAIN && pages > 1 && draw(3)) {
            now.pages = 1 + (int64_t)draw(pages - 1);
            now.out = now.pages * (int64_t)page_size;
        } else {
            const int64_t forms[] = {KEEP, 0, -now.number};
            now.out = forms[draw(3)];
        }
        /* Present: then it has to be, or the end state could not be checked. */
        if (now.number == EEXIST)
            now.pages = 1;
    }
    if (now.number == 0)
        return ioctl(fd, request, argument);
    __atomic_fetch_add(&injected, 1, __ATOMIC_RELAXED);
    if (now.pages) {
        uint64_t whole = *length;
        int64_t before = *out;
        *length = (uint64_t)now.pages * page_size;
        int done = ioctl(fd, request, argument);
        int present = done != 0 && errno == EEXIST && now.number == EEXIST;
        *length = whole;
        if (done != 0 && !present)
            return done; /* the kernel has an answer of its own, which is as good */
        *out = before;
    }
    if (now.out != KEEP)
        *out = now.out;
    errno = (int)now.number;
    return -1;
}
