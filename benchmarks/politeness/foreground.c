/* A stand-in for the person's own work: processes that want a whole core each and use the cache.
 * Usage: foreground SECONDS PROCESSES   ->   rounds of work done by all of them together */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static long work(double until) {
    enum { WORDS = 1 << 17 };            /* 1 MB: larger than the first cache, smaller than the last */
    unsigned long *memory = malloc(sizeof(unsigned long) * WORDS), x = 88172645463325252ul;
    for (long i = 0; i < WORDS; i++) memory[i] = i;
    long rounds = 0;
    while (now() < until) {
        for (int i = 0; i < 20000; i++) {
            x ^= x << 13; x ^= x >> 7; x ^= x << 17;
            memory[x & (WORDS - 1)] += x;
        }
        rounds++;
    }
    return rounds;
}

int main(int argc, char **argv) {
    double until = now() + (argc > 1 ? atof(argv[1]) : 8.0);
    int processes = argc > 2 ? atoi(argv[2]) : 2, pipes[2];
    long total = 0, rounds;
    if (pipe(pipes)) return 1;
    for (int i = 0; i < processes; i++)
        if (fork() == 0) {
            rounds = work(until);
            return write(pipes[1], &rounds, sizeof rounds) == sizeof rounds ? 0 : 1;
        }
    for (int i = 0; i < processes; i++)
        if (read(pipes[0], &rounds, sizeof rounds) == sizeof rounds) total += rounds;
    while (wait(NULL) > 0) {}
    printf("%ld\n", total);
    return 0;
}
