#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "_atomic.h"
#include "guest_image.h"
#include "machine.h"

/* A guest that fell behind its rate (parked in a fault, say) catches up this much, no more. */
#define CATCH_UP_NS UINT64_C(50000000)

uint64_t pagecore_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int wait_until(struct pagecore_machine *machine, uint64_t deadline)
{
    const struct timespec at = {(time_t)(deadline / 1000000000u), (long)(deadline % 1000000000u)};
    return pthread_cond_timedwait(&machine->changed, &machine->lock, &at);
}

static uint64_t deadline_after(uint64_t timeout)
{
    const uint64_t now = pagecore_now();
    return timeout > (UINT64_C(1) << 62) - now ? UINT64_C(1) << 62 : now + timeout;
}

static struct pagecore_control *control_of(const struct pagecore_vcpu *vcpu)
{
    return (struct pagecore_control *)(vcpu->machine->memory + vcpu->control_offset);
}

/* The machine's own writes: a process guest's log sees every writer, so they are marked there too. */
static void mark_control(const struct pagecore_vcpu *vcpu)
{
    const uint64_t page = vcpu->control_offset / PAGECORE_GUEST_PAGE_SIZE;
    if (vcpu->machine->dirty)
        pagecore_or(&vcpu->machine->dirty[page >> 6], UINT64_C(1) << (page & 63));
}

/* About equal parts, none of them a multiple of 64 pages: the words of their logs have tails. */
static uint64_t slot_border(uint64_t pages, uint32_t number, uint32_t slots)
{
    return number == 0 ? 0 : number == slots ? pages : pages * number / slots / 64 * 64 + 36 * number;
}

int pagecore_machine_init(struct pagecore_machine *machine, uint8_t *memory, uint64_t size, uint32_t vcpus,
                          uint32_t slots)
{
    const uint64_t pages = size / PAGECORE_GUEST_PAGE_SIZE;
    pthread_condattr_t attributes;
    int error;

    memset(machine, 0, sizeof *machine);
    machine->kind = PAGECORE_KIND_PROCESS;
    machine->memory = memory;
    machine->size = size;
    machine->layout = pagecore_guest_layout(pages, vcpus);
    machine->doorbell = size;
    machine->kvm_fd = machine->vm_fd = -1;
    machine->hold = 1;
    machine->vcpus = vcpus;
    machine->slots = slots;
    for (uint32_t number = 0; number < slots; number++) {
        machine->slot[number].first = slot_border(pages, number, slots);
        machine->slot[number].pages = slot_border(pages, number + 1, slots) - machine->slot[number].first;
    }
    for (uint32_t index = 0; index < vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        vcpu->machine = machine;
        vcpu->index = index;
        vcpu->control_offset =
            pagecore_guest_control_page(&machine->layout, index) * PAGECORE_GUEST_PAGE_SIZE;
        vcpu->fd = -1;
        vcpu->stop_in = PAGECORE_GUEST_NEVER;
    }
    if ((error = pthread_mutex_init(&machine->lock, NULL)))
        return -error;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error = pthread_cond_init(&machine->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    if (error)
        pthread_mutex_destroy(&machine->lock);
    return -error;
}

void pagecore_machine_destroy(struct pagecore_machine *machine)
{
    pagecore_kvm_close(machine);
    pthread_cond_destroy(&machine->changed);
    pthread_mutex_destroy(&machine->lock);
}

void pagecore_machine_boot(struct pagecore_machine *machine, uint64_t seed, uint64_t share, uint64_t batch)
{
    const struct pagecore_layout *layout = &machine->layout;
    const uint64_t code_size = (uint64_t)(__stop_pagecore_guest - __start_pagecore_guest);
    uint8_t *memory = machine->memory;

    for (uint64_t page = 0; page < layout->vcpu_first; page++)
        pagecore_guest_fixed_page(layout, page, __start_pagecore_guest, code_size,
                                  (uint64_t *)(memory + page * PAGECORE_GUEST_PAGE_SIZE));
    memset(memory + layout->vcpu_first * PAGECORE_GUEST_PAGE_SIZE, 0,
           (layout->data_first - layout->vcpu_first) * PAGECORE_GUEST_PAGE_SIZE);
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        struct pagecore_control *control = control_of(vcpu);

        pagecore_guest_configure(control, layout, index, seed, share, batch);
        control->cursor = PAGECORE_GUEST_NEVER;
        control->stop_at = PAGECORE_GUEST_NEVER;
        control->free_pages = pagecore_guest_seed_table((uint32_t *)(memory + control->table), control->count,
                                                        control->key, share);
        for (uint64_t page = control->first; page < control->first + control->count; page++)
            pagecore_guest_write_page((uint64_t *)(memory + page * PAGECORE_GUEST_PAGE_SIZE), seed, page, 1);
        pthread_mutex_lock(&machine->lock);
        vcpu->seen = *control;
        pthread_mutex_unlock(&machine->lock);
    }
}

int pagecore_vcpu_fail(struct pagecore_vcpu *vcpu, int error, const char *format, ...)
{
    va_list arguments;

    vcpu->error = error;
    va_start(arguments, format);
    vsnprintf(vcpu->error_text, sizeof vcpu->error_text, format, arguments);
    va_end(arguments);
    return -1;
}

/* Takes what the guest put into its ring since the last time. What a guest writes is not trusted: a ring that
 * claims more than it holds fails the vCPU, an entry outside its memory is dropped and counted. */
static int take_hints(struct pagecore_vcpu *vcpu)
{
    struct pagecore_control *control = control_of(vcpu);
    const uint64_t pages = vcpu->machine->layout.pages;
    const uint64_t vcpu_first = vcpu->control_offset / PAGECORE_GUEST_PAGE_SIZE;
    /* acquire: pairs with the guest's release: the entries are there before the index says so */
    const uint64_t produced = pagecore_load_acquire(&control->produced);
    const uint64_t consumed = pagecore_load_relaxed(&control->consumed);
    const struct pagecore_hint *ring =
        (const struct pagecore_hint *)(vcpu->machine->memory + (vcpu_first + 1) * PAGECORE_GUEST_PAGE_SIZE);

    vcpu->hint_count = 0;
    if (produced == consumed)
        return 0;
    if (produced - consumed > PAGECORE_GUEST_RING_ENTRIES)
        return pagecore_vcpu_fail(vcpu, 0, "the hint ring claims %llu entries of %llu",
                                  (unsigned long long)(produced - consumed),
                                  (unsigned long long)PAGECORE_GUEST_RING_ENTRIES);
    for (uint64_t index = consumed; index != produced; index++) {
        const struct pagecore_hint hint = ring[index & (PAGECORE_GUEST_RING_ENTRIES - 1)];
        if (hint.count != PAGECORE_HINT_END && (uint64_t)hint.first + hint.count > pages)
            vcpu->bad_hints++;
        else
            vcpu->hints[vcpu->hint_count++] = hint;
    }
    /* release: pairs with the guest's acquire: it may write over the entries from here on */
    pagecore_store_release(&control->consumed, produced);
    mark_control(vcpu);
    vcpu->wrote = 1;
    return 0;
}

/* Waits until the pages written since the pace began were due, or somebody wants something. */
/* Sleep until then, unless something is wanted of the vCPU. */
static void sleep_until(struct pagecore_vcpu *vcpu, uint64_t due)
{
    struct pagecore_machine *machine = vcpu->machine;

    pthread_mutex_lock(&machine->lock);
    while (!machine->hold && !machine->quit && !vcpu->kicked && vcpu->stop_in == PAGECORE_GUEST_NEVER)
        if (wait_until(machine, due) == ETIMEDOUT)
            break;
    pthread_mutex_unlock(&machine->lock);
}

static void pace(struct pagecore_vcpu *vcpu)
{
    struct pagecore_machine *machine = vcpu->machine;
    const double written = (double)(vcpu->seen.written - vcpu->pace_written);
    const uint64_t due = vcpu->pace_time + (uint64_t)(written / machine->pages_per_second * 1e9);
    const uint64_t now = pagecore_now();

    if (due + CATCH_UP_NS < now) {
        vcpu->pace_time = now - CATCH_UP_NS;
        vcpu->pace_written = vcpu->seen.written;
        return;
    }
    sleep_until(vcpu, due);
}

static int must_wait(const struct pagecore_vcpu *vcpu)
{
    const struct pagecore_machine *machine = vcpu->machine;
    if (machine->quit)
        return 0;
    return machine->hold || (vcpu->stopped && !vcpu->kicked && vcpu->stop_in == PAGECORE_GUEST_NEVER);
}

static int failed(struct pagecore_vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->machine->lock);
    vcpu->state = PAGECORE_VCPU_FAILED;
    pthread_cond_broadcast(&vcpu->machine->changed);
    pthread_mutex_unlock(&vcpu->machine->lock);
    return PAGECORE_RUN_FAILED;
}

int pagecore_vcpu_run(struct pagecore_vcpu *vcpu)
{
    struct pagecore_machine *machine = vcpu->machine;
    struct pagecore_control *control = control_of(vcpu);

    vcpu->hint_count = 0;
    vcpu->wrote = 0;
    for (;;) {
        uint64_t left = 0, began, left_at;
        int outcome;

        /* Here, not where it left: a guest that hints comes back from Python after nearly every batch. */
        if (vcpu->ahead) {
            vcpu->ahead = 0;
            pace(vcpu);
        }
        if (vcpu->rest) {
            sleep_until(vcpu, pagecore_now() + vcpu->rest);
            vcpu->rest = 0;
        }
        pthread_mutex_lock(&machine->lock);
        if (vcpu->state == PAGECORE_VCPU_RUNNING && vcpu->stop_in != PAGECORE_GUEST_NEVER) {
            /* Before it parks: what was asked for must be in the memory that migrates. */
            const uint64_t steps = vcpu->stop_in;
            vcpu->stop_in = PAGECORE_GUEST_NEVER;
            vcpu->stopped = 0;
            pthread_mutex_unlock(&machine->lock);
            /* release: pairs with the guest's acquire at the start of its batch */
            pagecore_store_release(&control->stop_at, control->steps + steps);
            mark_control(vcpu);
            vcpu->wrote = 1;
            return PAGECORE_RUN_EVENT;
        }
        while (must_wait(vcpu)) {
            if (vcpu->state != PAGECORE_VCPU_PARKED) {
                if (vcpu->unfinished) {
                    pthread_mutex_unlock(&machine->lock);
                    if (pagecore_kvm_settle(vcpu))
                        return failed(vcpu);
                    pthread_mutex_lock(&machine->lock);
                    continue;
                }
                vcpu->state = PAGECORE_VCPU_PARKED;
                pthread_cond_broadcast(&machine->changed);
            }
            pthread_cond_wait(&machine->changed, &machine->lock);
        }
        if (machine->quit) {
            pthread_mutex_unlock(&machine->lock);
            return PAGECORE_RUN_QUIT;
        }
        if (vcpu->state == PAGECORE_VCPU_PARKED) {
            vcpu->state = PAGECORE_VCPU_RUNNING;
            vcpu->entries++;
            vcpu->entered_at = pagecore_now();
            vcpu->pace_time = vcpu->entered_at;
            vcpu->pace_written = vcpu->seen.written;
            pthread_cond_broadcast(&machine->changed);
            if (vcpu->stop_in != PAGECORE_GUEST_NEVER) {
                pthread_mutex_unlock(&machine->lock);
                continue;
            }
        }
        vcpu->kicked = 0;
        pthread_mutex_unlock(&machine->lock);

        began = pagecore_now();
        if (machine->kind == PAGECORE_KIND_KVM) {
            if (pagecore_kvm_enter(vcpu, &left))
                return failed(vcpu);
        } else {
            left = pagecore_guest_program(machine->memory, vcpu->control_offset, machine->dirty, NULL);
        }
        left_at = pagecore_now();
        outcome = take_hints(vcpu);

        pthread_mutex_lock(&machine->lock);
        vcpu->left_at = left_at;
        /* Of every batch: a guest that rests seldom and long would look stuck. */
        if (machine->throttle > 0 && left == PAGECORE_LEFT_TICK)
            vcpu->rest = (uint64_t)((double)(left_at - began) * machine->throttle / (1 - machine->throttle));
        if (vcpu->seen.magic == 0)
            vcpu->pace_written = control->written;      /* the first look at memory that migrated in */
        vcpu->seen = *control;
        vcpu->stopped = left == PAGECORE_LEFT_STOPPED;
        pthread_cond_broadcast(&machine->changed);
        pthread_mutex_unlock(&machine->lock);

        if (outcome)
            return failed(vcpu);
        vcpu->ahead = left == PAGECORE_LEFT_TICK && machine->pages_per_second > 0;
        if (vcpu->wrote)
            return PAGECORE_RUN_EVENT;
    }
}

void pagecore_machine_throttle(struct pagecore_machine *machine, double share)
{
    pthread_mutex_lock(&machine->lock);
    machine->throttle = share;
    pthread_mutex_unlock(&machine->lock);
}

int pagecore_machine_pause(struct pagecore_machine *machine, uint64_t timeout, uint64_t *at)
{
    const uint64_t deadline = deadline_after(timeout);
    int error = 0;

    *at = 0;
    pthread_mutex_lock(&machine->lock);
    machine->hold = 1;
    pthread_cond_broadcast(&machine->changed);
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        while (vcpu->state == PAGECORE_VCPU_RUNNING && !error)
            error = wait_until(machine, deadline);
        if (vcpu->left_at > *at)
            *at = vcpu->left_at;
    }
    pthread_mutex_unlock(&machine->lock);
    return -error;
}

int pagecore_machine_resume(struct pagecore_machine *machine, uint64_t timeout, uint64_t *at)
{
    const uint64_t deadline = deadline_after(timeout);
    uint64_t before[PAGECORE_MAX_VCPUS];
    int error = 0;

    *at = 0;
    pthread_mutex_lock(&machine->lock);
    machine->hold = 0;
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        before[index] = vcpu->entries - (vcpu->state == PAGECORE_VCPU_RUNNING);
        vcpu->kicked = 1;
    }
    pthread_cond_broadcast(&machine->changed);
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        while (vcpu->entries == before[index] && vcpu->state != PAGECORE_VCPU_FAILED && !machine->hold
               && !error)
            error = wait_until(machine, deadline);
        if (vcpu->entered_at && (*at == 0 || vcpu->entered_at < *at))
            *at = vcpu->entered_at;
    }
    pthread_mutex_unlock(&machine->lock);
    return -error;
}

int pagecore_machine_wait_stopped(struct pagecore_machine *machine, uint64_t timeout)
{
    const uint64_t deadline = deadline_after(timeout);
    int error = 0;

    pthread_mutex_lock(&machine->lock);
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        /* Parked as well: its last hints and writes have been handed over then. */
        while (!(vcpu->stopped && vcpu->state == PAGECORE_VCPU_PARKED
                 && vcpu->stop_in == PAGECORE_GUEST_NEVER)
               && vcpu->state != PAGECORE_VCPU_FAILED && !error)
            error = wait_until(machine, deadline);
    }
    pthread_mutex_unlock(&machine->lock);
    return !error;
}

int pagecore_machine_failed(struct pagecore_machine *machine)
{
    int failed = 0;

    pthread_mutex_lock(&machine->lock);
    for (uint32_t index = 0; index < machine->vcpus; index++)
        failed |= machine->vcpu[index].state == PAGECORE_VCPU_FAILED;
    pthread_mutex_unlock(&machine->lock);
    return failed;
}

void pagecore_machine_quit(struct pagecore_machine *machine)
{
    pthread_mutex_lock(&machine->lock);
    machine->quit = 1;
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->lock);
}

/* The stores stand outside the lock: at the destination each may sleep in a fault. */
void pagecore_machine_announce(struct pagecore_machine *machine, uint64_t command)
{
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        /* release: pairs with the guest's acquire at the start of its batch (S4) */
        pagecore_store_release(&control_of(&machine->vcpu[index])->command, command);
        mark_control(&machine->vcpu[index]);
    }
    pthread_mutex_lock(&machine->lock);
    for (uint32_t index = 0; index < machine->vcpus; index++)
        machine->vcpu[index].kicked = 1;
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->lock);
}

uint32_t pagecore_machine_stop_after(struct pagecore_machine *machine, uint64_t steps, uint64_t *written)
{
    uint32_t count = 0;

    pthread_mutex_lock(&machine->lock);
    for (uint32_t index = 0; index < machine->vcpus; index++) {
        struct pagecore_vcpu *vcpu = &machine->vcpu[index];
        vcpu->stopped = 0;
        if (machine->hold && vcpu->state == PAGECORE_VCPU_PARKED) {
            /* Parked, and the lock keeps it so: the count of steps stands still. */
            struct pagecore_control *control = control_of(vcpu);
            pagecore_store_release(&control->stop_at, control->steps + steps);
            mark_control(vcpu);
            written[count++] = vcpu->control_offset / PAGECORE_GUEST_PAGE_SIZE;
        } else {
            vcpu->stop_in = steps;
        }
    }
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->lock);
    return count;
}

void pagecore_machine_seen(struct pagecore_machine *machine, uint32_t index, struct pagecore_control *control)
{
    pthread_mutex_lock(&machine->lock);
    *control = machine->vcpu[index].seen;
    pthread_mutex_unlock(&machine->lock);
}

uint64_t pagecore_machine_call(void *code, uint8_t *memory, uint64_t control_offset)
{
    uint64_t (*program)(uint8_t *, uint64_t, uint64_t *, uint64_t *);
    memcpy(&program, &code, sizeof program);
    return program(memory, control_offset, NULL, NULL);
}
