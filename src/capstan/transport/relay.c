/* A network between TUN devices: every device sends and receives at most at a rate, and a packet arrives one
 * delay after it was sent. What would wait too long is dropped, as a switch does. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_PACKET 65536
#define MAX_DEVICES 64
#define AT_ONCE 64

typedef struct {
    int64_t due_ns;
    uint64_t order;
    int target;
    int length;
    unsigned char *bytes;
} Packet;

static Packet *heap;
static size_t heap_size, heap_room;

static int is_before(const Packet *one, const Packet *other) {
    return one->due_ns < other->due_ns || (one->due_ns == other->due_ns && one->order < other->order);
}

static int push(Packet packet) {
    if (heap_size == heap_room) {
        size_t room = heap_room ? 2 * heap_room : 1024;
        Packet *larger = realloc(heap, room * sizeof(Packet));
        if (!larger) return -1;
        heap = larger;
        heap_room = room;
    }
    size_t at = heap_size++;
    while (at && is_before(&packet, &heap[(at - 1) / 2])) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = packet;
    return 0;
}

static Packet pop(void) {
    Packet first = heap[0], last = heap[--heap_size];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && is_before(&heap[child + 1], &heap[child])) child++;
        if (!is_before(&heap[child], &last)) break;
        heap[at] = heap[child];
        at = child;
    }
    if (heap_size) heap[at] = last;
    return first;
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int64_t later(int64_t one, int64_t other) { return one > other ? one : other; }

/* Relay until a device is gone. Device i has the address base + i; ns_per_byte and delay are those of every
 * device's link; a packet that would wait longer than limit_ns in a queue is dropped. Returns errno. */
int capstan_relay(const int *devices, int num_devices, uint32_t base, double ns_per_byte, int64_t delay_ns,
                  int64_t limit_ns) {
    static unsigned char buffer[MAX_PACKET];
    int64_t sent_until[MAX_DEVICES] = {0}, received_until[MAX_DEVICES] = {0};
    struct pollfd polled[MAX_DEVICES];
    uint64_t order = 0;
    if (num_devices > MAX_DEVICES) return EINVAL;
    for (int i = 0; i < num_devices; i++) polled[i] = (struct pollfd){.fd = devices[i], .events = POLLIN};
    for (;;) {
        int64_t wait_ns = heap_size ? later(0, heap[0].due_ns - now_ns()) : 1000000000;
        struct timespec timeout = {wait_ns / 1000000000, wait_ns % 1000000000};
        if (ppoll(polled, num_devices, &timeout, NULL) < 0 && errno != EINTR) return errno;
        for (int i = 0; i < num_devices; i++) {
            if (polled[i].revents & (POLLERR | POLLHUP | POLLNVAL)) return ENODEV;
            if (!(polled[i].revents & POLLIN)) continue;
            for (int count = 0; count < AT_ONCE; count++) {
                ssize_t length = read(devices[i], buffer, MAX_PACKET);
                if (length < 20) break; /* nothing more, or no packet */
                uint32_t address;
                memcpy(&address, buffer + 16, 4);
                int64_t target = (int64_t)ntohl(address) - base;
                if (buffer[0] >> 4 != 4 || target < 0 || target >= num_devices) continue;
                int64_t now = now_ns(), takes = (int64_t)(length * ns_per_byte);
                if (later(0, sent_until[i] - now) > limit_ns) continue;
                int64_t left = later(now, sent_until[i]) + takes;
                int64_t arrives = later(left + delay_ns, received_until[target] + takes);
                if (arrives - left - delay_ns > limit_ns) continue;
                Packet packet = {arrives, order++, (int)target, (int)length, malloc(length)};
                if (!packet.bytes) return ENOMEM;
                sent_until[i] = left;
                received_until[target] = arrives;
                memcpy(packet.bytes, buffer, length);
                if (push(packet)) return ENOMEM;
            }
        }
        int64_t now = now_ns();
        while (heap_size && heap[0].due_ns <= now) {
            Packet packet = pop();
            if (write(devices[packet.target], packet.bytes, packet.length) < 0) { /* a full queue drops it */
            }
            free(packet.bytes);
        }
    }
}
