/* The machine around a test guest: enters it, takes its hints when it leaves, paces it, parks it.
 *
 * Each vCPU is one thread that calls pagecore_vcpu_run() again and again without the GIL; the call comes back
 * only when there is something for Python. Guest memory is touched by these functions alone, never with the
 * GIL held: at the destination a page may be missing, and whatever fills it must not need what this thread
 * holds.
 */
#ifndef PAGECORE_MACHINE_H
#define PAGECORE_MACHINE_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "guest_program.h"

#define PAGECORE_MAX_VCPUS 16
#define PAGECORE_MAX_SLOTS 8

enum { PAGECORE_KIND_PROCESS = 1, PAGECORE_KIND_KVM = 2 };

/* Why pagecore_vcpu_run() came back. */
enum { PAGECORE_RUN_QUIT = 0, PAGECORE_RUN_EVENT = 1, PAGECORE_RUN_FAILED = 2 };

enum { PAGECORE_VCPU_PARKED = 0, PAGECORE_VCPU_RUNNING = 1, PAGECORE_VCPU_FAILED = 2 };

struct pagecore_machine;
struct pagecore_ring;
struct kvm_run;

struct pagecore_vcpu {
    struct pagecore_machine *machine;
    uint32_t index;
    uint64_t control_offset;
    /* KVM */
    int fd;
    struct kvm_run *run;
    size_t run_size;
    uint64_t full_exits;        /* how often its dirty ring was full */
    int unfinished;             /* the store that left the guest has not been completed yet */
    /* under the machine's lock */
    int state;
    int stopped;                /* the guest stopped itself; entered again only when kicked */
    int kicked;
    uint64_t entries;           /* how often it left the park */
    uint64_t stop_in;           /* steps; NEVER where nobody asked */
    uint64_t entered_at;        /* CLOCK_MONOTONIC, ns: before the first instruction since the park */
    uint64_t left_at;           /* after the last instruction */
    struct pagecore_control seen;   /* the control page when the guest last left */
    /* the vCPU's thread alone */
    uint64_t rest;              /* ns, before the next batch */
    uint64_t pace_time;
    uint64_t pace_written;
    int ahead;                  /* it may have written more than it was to by now */
    uint32_t hint_count;
    uint64_t bad_hints;
    int wrote;                  /* the machine wrote into the control page (S12) */
    struct pagecore_hint hints[PAGECORE_GUEST_RING_ENTRIES];
    int error;                  /* errno, or 0 with only a text */
    char error_text[160];
};

struct pagecore_slot {
    uint64_t first;             /* page */
    uint64_t pages;
};

struct pagecore_machine {
    int kind;
    uint8_t *memory;
    uint64_t size;
    struct pagecore_layout layout;
    uint64_t *dirty;            /* the log of a process guest at the source, or NULL */
    double pages_per_second;    /* of one vCPU; 0: flat out */
    double throttle;            /* the share of its time that a vCPU rests, below 1; under the lock */
    uint64_t doorbell;          /* guest address that no memory backs */
    int kvm_fd, vm_fd;
    uint32_t ring_size;         /* bytes of each vCPU's dirty ring; 0: none */
    struct pagecore_ring *ring; /* who reaps them, while vCPUs run */
    uint32_t slots;             /* of KVM, that guest memory is made of */
    struct pagecore_slot slot[PAGECORE_MAX_SLOTS];

    pthread_mutex_t lock;
    pthread_cond_t changed;     /* by CLOCK_MONOTONIC */
    int hold;                   /* paused, or not started yet */
    int quit;
    uint32_t vcpus;
    struct pagecore_vcpu vcpu[PAGECORE_MAX_VCPUS];
};

int pagecore_machine_init(struct pagecore_machine *machine, uint8_t *memory, uint64_t size, uint32_t vcpus,
                          uint32_t slots);
void pagecore_machine_destroy(struct pagecore_machine *machine);
void pagecore_machine_boot(struct pagecore_machine *machine, uint64_t seed, uint64_t share, uint64_t batch);

int pagecore_vcpu_run(struct pagecore_vcpu *vcpu);

/* 0, or -ETIMEDOUT; *at is the time of the last (first) guest instruction in ns. */
int pagecore_machine_pause(struct pagecore_machine *machine, uint64_t timeout, uint64_t *at);
int pagecore_machine_resume(struct pagecore_machine *machine, uint64_t timeout, uint64_t *at);
/* 1 once every vCPU has stopped itself (or failed), 0 when the time is over. */
int pagecore_machine_wait_stopped(struct pagecore_machine *machine, uint64_t timeout);
int pagecore_machine_failed(struct pagecore_machine *machine);
void pagecore_machine_throttle(struct pagecore_machine *machine, double share);
void pagecore_machine_quit(struct pagecore_machine *machine);
void pagecore_machine_announce(struct pagecore_machine *machine, uint64_t command);
/* Returns how many control pages it wrote itself; the others are written by their vCPU's thread. */
uint32_t pagecore_machine_stop_after(struct pagecore_machine *machine, uint64_t steps, uint64_t *written);
void pagecore_machine_seen(struct pagecore_machine *machine, uint32_t index,
                           struct pagecore_control *control);

/* The program in another place; the test that it stands alone uses this. */
uint64_t pagecore_machine_call(void *code, uint8_t *memory, uint64_t control_offset);

uint64_t pagecore_now(void);
int pagecore_vcpu_fail(struct pagecore_vcpu *vcpu, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* kvm_machine.c. Errors are -errno; *what names the step that failed. */
int pagecore_kvm_open(struct pagecore_machine *machine, const char *device, const char **what);
void pagecore_kvm_close(struct pagecore_machine *machine);
int pagecore_kvm_enter(struct pagecore_vcpu *vcpu, uint64_t *left);
int pagecore_kvm_settle(struct pagecore_vcpu *vcpu);
size_t pagecore_kvm_state_size(void);
int pagecore_kvm_get_state(struct pagecore_vcpu *vcpu, uint8_t *state);
int pagecore_kvm_set_state(struct pagecore_vcpu *vcpu, const uint8_t *state);

#endif
