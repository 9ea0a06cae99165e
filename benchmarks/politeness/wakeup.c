/* A stand-in for an interactive program: wakes at 60 Hz (jittered), works 3 ms, and prints how late each wake-up was.
 * Usage: wakeup SECONDS   ->   one line: wakes p50_ms p95_ms p99_ms max_ms missed_frames_percent */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double cpu_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    double seconds = argc > 1 ? atof(argv[1]) : 8.0, frame = 1.0 / 60.0;
    int room = (int)(seconds * 70) + 100, count = 0, missed = 0;
    double *late = malloc(sizeof(double) * room), start = now(), due = start;
    unsigned random = 12345;
    while (now() - start < seconds && count < room) {
        random = random * 1103515245u + 12345u;
        due += frame * (0.9 + 0.2 * (random >> 16 & 0x7fff) / 32768.0);
        struct timespec until = {(time_t)due, (long)((due - (time_t)due) * 1e9)};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        late[count++] = now() - due;
        double work_until = cpu_now() + 0.003;
        while (cpu_now() < work_until) {}
        if (now() > due + frame) { missed++; due = now(); }
    }
    qsort(late, count, sizeof(double), ascending);
    printf("%d %.4f %.4f %.4f %.4f %.3f\n", count, late[count / 2] * 1e3, late[(int)(count * 0.95)] * 1e3,
           late[(int)(count * 0.99)] * 1e3, late[count - 1] * 1e3, 100.0 * missed / count);
    return 0;
}
