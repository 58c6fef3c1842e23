/* The floor of bench_link.py: what plain C needs to move pages over a stream socket, in frames of the same size and calls of
 * 2 MiB, and to fetch one page by a request. It checks nothing of what it is sent. Built by conftest.py on its own with -O2,
 * and called through ctypes, which releases the GIL.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

enum { PAGE = 4096, HEADER = 40, BLOCK = 2 << 20 };

/* Younger than some systems' headers. */
#ifndef UFFDIO_MOVE
struct uffdio_move {
    uint64_t dst, src, len, mode;
    int64_t move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int receive_all(int fd, void *buffer, size_t length)
{
    for (size_t done = 0; done < length;) {
        const ssize_t got = recv(fd, (char *)buffer + done, length - done, 0);
        if (got == 0 || (got < 0 && errno != EINTR))
            return -1;
        if (got > 0)
            done += (size_t)got;
    }
    return 0;
}

static int send_all(int fd, struct iovec *parts, size_t count)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return -1;
        while (sent > 0 && message.msg_iovlen) {
            struct iovec *part = message.msg_iov;
            const size_t some = (size_t)sent < part->iov_len ? (size_t)sent : part->iov_len;
            part->iov_base = (char *)part->iov_base + some;
            part->iov_len -= some;
            sent -= (ssize_t)some;
            if (!part->iov_len) {
                message.msg_iov++;
                message.msg_iovlen--;
            }
        }
    }
    return 0;
}

/* Send `length` bytes from `from` as frames of `frame` bytes, `batch` bytes a system call; returns the bytes sent. */
size_t floor_send(int fd, char *from, size_t length, size_t frame, size_t batch)
{
    char header[HEADER] = {0};
    size_t done = 0;
    while (done < length) {
        struct iovec parts[512];
        size_t count = 0;
        for (size_t end = done + batch; done < end && done < length && count < 510; done += frame) {
            parts[count++] = (struct iovec){header, HEADER};
            parts[count++] = (struct iovec){from + done, frame < length - done ? frame : length - done};
        }
        if (send_all(fd, parts, count))
            return 0;
    }
    return done;
}

/* Receive what floor_send sends, again and again into the same buffer of one frame; returns the bytes received. */
size_t floor_receive(int fd, char *buffer, size_t length, size_t frame)
{
    char header[HEADER];
    size_t done = 0;
    while (done < length) {
        const size_t some = frame < length - done ? frame : length - done;
        if (receive_all(fd, header, HEADER) || receive_all(fd, buffer, some))
            break;
        done += some;
    }
    return done;
}

/* Answer requests for a page, whose number stands where the frame has it, until the peer hangs up. */
size_t floor_answer(int fd, char *from)
{
    union {
        char bytes[HEADER];
        uint64_t words[HEADER / 8];
    } request;
    size_t answered = 0;
    while (!receive_all(fd, request.bytes, HEADER)) {
        struct iovec parts[2] = {{request.bytes, HEADER}, {from + request.words[2] * PAGE, PAGE}};
        if (send_all(fd, parts, 2))
            break;
        answered++;
    }
    return answered;
}

/* Ask for each page of `order`, place it by COPY, and note how long that took, in nanoseconds; returns how many came. */
size_t floor_ask(int fd, int uffd, uint64_t base, const uint32_t *order, size_t count, uint32_t *took)
{
    union {
        char bytes[HEADER];
        uint64_t words[HEADER / 8];
    } request = {{0}};
    static _Alignas(PAGE) char page[PAGE];
    for (size_t at = 0; at < count; at++) {
        const uint64_t before = now_ns();
        struct iovec part = {request.bytes, HEADER};
        request.words[2] = order[at];
        if (send_all(fd, &part, 1) || receive_all(fd, request.bytes, HEADER) || receive_all(fd, page, PAGE))
            return at;
        struct uffdio_copy copy = {.dst = base + (uint64_t)order[at] * PAGE, .src = (uintptr_t)page, .len = PAGE};
        if (ioctl(uffd, UFFDIO_COPY, &copy) != 0)
            return at;
        took[at] = (uint32_t)(now_ns() - before);
    }
    return count;
}

#ifdef __x86_64__
#define FOR_THIS_PROCESSOR __attribute__((target_clones("avx2", "default"), optimize("O3")))
#else
#define FOR_THIS_PROCESSOR
#endif

/* Read each byte of memory once, lines of the next page asked for ahead: what a look for zeros costs at the least. Of the
 * reads that were tried this one is the fastest. `count` is a multiple of 64.
 */
FOR_THIS_PROCESSOR uint64_t floor_read(const uint64_t *words, size_t count)
{
    uint64_t sums[16] = {0}, all = 0;
    for (size_t at = 0; at < count; at += 16) {
        __builtin_prefetch(words + at + 512);
        __builtin_prefetch(words + at + 520);
        for (size_t lane = 0; lane < 16; lane++)
            sums[lane] |= words[at + lane];
    }
    for (size_t lane = 0; lane < 16; lane++)
        all |= sums[lane];
    return all;
}

/* Place `length` bytes by COPY, each `chunk` from the same buffer; returns the bytes placed. */
size_t floor_place(int uffd, uint64_t to, char *buffer, size_t length, size_t chunk)
{
    size_t done = 0;
    for (; done < length; done += chunk) {
        struct uffdio_copy copy = {.dst = to + done, .src = (uintptr_t)buffer, .len = chunk};
        if (ioctl(uffd, UFFDIO_COPY, &copy) != 0)
            break;
    }
    return done;
}

/* Receive what floor_send sends, and place each frame as it has come; returns the bytes placed. */
size_t floor_receive_and_place(int fd, int uffd, uint64_t to, char *buffer, size_t length, size_t frame)
{
    size_t done = 0;
    while (done < length) {
        const size_t some = frame < length - done ? frame : length - done;
        if (floor_receive(fd, buffer, some, frame) != some || floor_place(uffd, to + done, buffer, some, some) != some)
            break;
        done += some;
    }
    return done;
}

/* Receive what floor_send sends in huge pages from `stage`, which is aligned to them, and move each as it is whole; returns the
 * bytes placed. `frame` divides a huge page, a huge page `length`.
 */
size_t floor_receive_and_move(int fd, int uffd, uint64_t to, char *stage, size_t length, size_t frame)
{
    size_t done = 0;
    for (; done < length; done += BLOCK) {
        for (size_t at = 0; at < BLOCK; at += frame)
            if (floor_receive(fd, stage + at, frame, frame) != frame)
                return done;
        struct uffdio_move move = {.dst = to + done, .src = (uintptr_t)stage, .len = BLOCK};
        if (ioctl(uffd, UFFDIO_MOVE, &move) != 0)
            break;
    }
    return done;
}
