# The declarations of machine.h, for _machine_state and _guest alone: a consumer would need our include path.

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "testing/machine.h" nogil:
    enum: PAGECORE_GUEST_CODE_PAGES
    enum: PAGECORE_GUEST_RING_ENTRIES
    enum: PAGECORE_GUEST_RING_PAGES
    enum: PAGECORE_MAX_VCPUS
    enum: PAGECORE_MAX_SLOTS
    enum: PAGECORE_KIND_KVM
    enum: PAGECORE_RUN_QUIT
    enum: PAGECORE_RUN_FAILED
    enum: PAGECORE_VCPU_FAILED
    enum: PAGECORE_HINT_END

    uint64_t PAGECORE_GUEST_PAGE_SIZE
    const uint8_t *__start_pagecore_guest
    const uint8_t *__stop_pagecore_guest

    struct pagecore_hint:
        uint64_t epoch
        uint32_t first
        uint32_t count

    struct pagecore_control:
        uint64_t steps, checks, errors, written, freed, allocated, free_pages
        uint64_t error_page, error_step, error_word, error_found, error_wanted

    struct pagecore_layout:
        uint64_t pages, vcpus, paging_first, paging_pages, code_first, vcpu_first
        uint64_t table_first, table_pages, data_first, data_pages

    struct pagecore_ring:
        pass

    struct pagecore_vcpu:
        int fd
        uint64_t full_exits
        uint64_t control_offset
        int state
        uint32_t hint_count
        uint64_t bad_hints
        int wrote
        pagecore_hint *hints
        int error
        const char *error_text

    struct pagecore_slot:
        uint64_t first, pages

    struct pagecore_machine:
        int kind
        uint64_t *dirty
        double pages_per_second
        int vm_fd
        uint32_t ring_size
        pagecore_ring *ring
        int hold
        uint32_t vcpus
        uint32_t slots
        pagecore_slot *slot
        pagecore_layout layout
        pagecore_vcpu *vcpu

    pagecore_layout pagecore_guest_layout(uint64_t pages, uint64_t vcpus)
    int pagecore_machine_init(pagecore_machine *machine, uint8_t *memory, uint64_t size, uint32_t vcpus,
                              uint32_t slots)
    void pagecore_machine_destroy(pagecore_machine *machine)
    void pagecore_machine_boot(pagecore_machine *machine, uint64_t seed, uint64_t share, uint64_t batch)
    int pagecore_vcpu_run(pagecore_vcpu *vcpu)
    int pagecore_machine_pause(pagecore_machine *machine, uint64_t timeout, uint64_t *at)
    int pagecore_machine_resume(pagecore_machine *machine, uint64_t timeout, uint64_t *at)
    int pagecore_machine_wait_stopped(pagecore_machine *machine, uint64_t timeout)
    int pagecore_machine_failed(pagecore_machine *machine)
    void pagecore_machine_throttle(pagecore_machine *machine, double share)
    void pagecore_machine_quit(pagecore_machine *machine)
    void pagecore_machine_announce(pagecore_machine *machine, uint64_t command)
    uint32_t pagecore_machine_stop_after(pagecore_machine *machine, uint64_t steps, uint64_t *written)
    void pagecore_machine_seen(pagecore_machine *machine, uint32_t index, pagecore_control *control)
    uint64_t pagecore_machine_call(void *code, uint8_t *memory, uint64_t control_offset)
    int pagecore_kvm_open(pagecore_machine *machine, const char *device, const char **what)
    size_t pagecore_kvm_state_size()
    int pagecore_kvm_get_state(pagecore_vcpu *vcpu, uint8_t *state)
    int pagecore_kvm_set_state(pagecore_vcpu *vcpu, const uint8_t *state)
