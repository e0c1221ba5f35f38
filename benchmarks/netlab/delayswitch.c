/* delayswitch DELAY_US N: N hosts on one machine, with a network that delivers every packet a fixed time after it was
 * sent. Each host is a network namespace with a TUN device eth0, address 10.77.0.(i+1)/24; the switch between them runs
 * in this process, in user space.
 *
 * Needs Linux, root, /dev/net/tun and the program `ip` (iproute2). Prints "ready" and N file descriptors, one per
 * host: `nsenter --net=/proc/PID/fd/DESCRIPTOR COMMAND` runs a command on that host. Namespaces have no names, so they
 * end with this process, and this process ends with the one that started it. benchmarks/hosts.py does all of that. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MAX_HOSTS = 64, MTU = 65000 };

struct packet {
    struct packet *next;
    long long due_ns;
    int host, length;
    char bytes[];
};

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Enter a new network namespace, bring its devices up, and return the end of its eth0 that the switch holds. */
static int open_host(int host, int *namespace) {
    if (unshare(CLONE_NEWNET)) fail("new network namespace");
    *namespace = open("/proc/self/ns/net", O_RDONLY);
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (tun < 0) fail("/dev/net/tun");
    struct ifreq request;
    memset(&request, 0, sizeof request);
    strcpy(request.ifr_name, "eth0");
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    if (ioctl(tun, TUNSETIFF, &request)) fail("TUN device");
    char text[256];
    snprintf(text, sizeof text,
             "ip addr add 10.77.0.%d/24 dev eth0 && ip link set eth0 mtu %d txqueuelen 10000 up && ip link set lo up",
             host + 1, MTU);
    if (system(text)) {
        fprintf(stderr, "failed: %s\n", text);
        exit(1);
    }
    return tun;
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: delayswitch DELAY_US N\n"); return 2; }
    long long delay_ns = (long long)(atof(argv[1]) * 1000);
    int hosts = atoi(argv[2]);
    if (hosts < 1 || hosts > MAX_HOSTS) { fprintf(stderr, "N must be 1 to %d\n", MAX_HOSTS); return 2; }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1000);
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct pollfd port[MAX_HOSTS];
    int namespaces[MAX_HOSTS];
    for (int i = 0; i < hosts; i++) port[i] = (struct pollfd){.fd = open_host(i, &namespaces[i]), .events = POLLIN};
    printf("ready");
    for (int i = 0; i < hosts; i++) printf(" %d", namespaces[i]);
    puts("");

    struct packet *head = NULL, **tail = &head;
    static char buffer[MTU + 5000];
    for (;;) {
        struct timespec wait, *timeout = NULL;
        if (head) {
            long long left = head->due_ns - now_ns();
            if (left < 0) left = 0;
            wait = (struct timespec){.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
            timeout = &wait;
        }
        ppoll(port, hosts, timeout, NULL);
        for (int i = 0; i < hosts; i++) {
            if (!(port[i].revents & POLLIN)) continue;
            int length;
            while ((length = read(port[i].fd, buffer, sizeof buffer)) > 0) {
                int host = (unsigned char)buffer[19] - 1; /* last byte of the IPv4 destination */
                if ((buffer[0] >> 4) != 4 || host < 0 || host >= hosts) continue;
                struct packet *p = malloc(sizeof *p + length);
                *p = (struct packet){.due_ns = now_ns() + delay_ns, .host = host, .length = length};
                memcpy(p->bytes, buffer, length);
                *tail = p;
                tail = &p->next;
            }
        }
        for (long long now = now_ns(); head && head->due_ns <= now;) {
            struct packet *p = head;
            head = p->next;
            if (!head) tail = &head;
            if (write(port[p->host].fd, p->bytes, p->length) < 0 && errno != EAGAIN) perror("write");
            free(p);
        }
    }
}
