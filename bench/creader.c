/* Readers that cost little, to see what a FUSE server costs: prints operations (or bytes) and seconds.
 *
 * creader pages FILE COUNT THREADS SEED   COUNT different 4 KiB pages in no order, none of them in the page cache
 * creader names DIRECTORY FIRST COUNT THREADS   lstat of f<number> for COUNT numbers from FIRST on
 * creader whole FILE BYTES   1 MiB at a time from the start, none of it in the page cache
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK = 1 << 20 };

static int fd;
static const char *directory;
static long first, count, threads;
static uint32_t *pages;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static void *read_pages(void *which) {
    char page[PAGE];
    for (long i = (long)which; i < count; i += threads)
        if (pread(fd, page, PAGE, (off_t)pages[i] * PAGE) != PAGE)
            fail("pread");
    return NULL;
}

static void *look_up(void *which) {
    char path[4096];
    struct stat st;
    for (long i = (long)which; i < count; i += threads) {
        snprintf(path, sizeof path, "%s/f%06ld", directory, first + i);
        if (lstat(path, &st))
            fail(path);
    }
    return NULL;
}

static double run(void *(*work)(void *)) {
    pthread_t started[64];
    double began = now();
    for (long i = 0; i < threads; i++)
        if (pthread_create(&started[i], NULL, work, (void *)i))
            fail("pthread_create");
    for (long i = 0; i < threads; i++)
        pthread_join(started[i], NULL);
    return now() - began;
}

/* Opens a file and forgets its pages. */
static void open_cold(const char *path, int advice) {
    fd = open(path, O_RDONLY);
    if (fd < 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) || posix_fadvise(fd, 0, 0, advice))
        fail(path);
}

static void choose_pages(uint32_t all, unsigned seed) {
    pages = malloc(all * sizeof *pages);
    if (!pages || count > (long)all)
        exit(1);
    srandom(seed);
    for (uint32_t i = 0; i < all; i++)
        pages[i] = i;
    for (uint32_t i = all - 1; i > 0; i--) {
        uint32_t other = random() % (i + 1), page = pages[i];
        pages[i] = pages[other];
        pages[other] = page;
    }
}

static double read_whole(long bytes) {
    static char chunk[CHUNK];
    double began = now();
    for (long at = 0; at < bytes; at += CHUNK)
        if (read(fd, chunk, CHUNK) <= 0)
            fail("read");
    return now() - began;
}

int main(int argc, char **argv) {
    struct stat st;
    if (argc == 6 && !strcmp(argv[1], "pages")) {
        count = atol(argv[3]), threads = atol(argv[4]);
        open_cold(argv[2], POSIX_FADV_RANDOM);
        fstat(fd, &st);
        choose_pages(st.st_size / PAGE, atoi(argv[5]));
        printf("%ld %.6f\n", count, run(read_pages));
    } else if (argc == 6 && !strcmp(argv[1], "names")) {
        directory = argv[2], first = atol(argv[3]), count = atol(argv[4]), threads = atol(argv[5]);
        if (lstat(directory, &st))
            fail(directory);
        printf("%ld %.6f\n", count, run(look_up));
    } else if (argc == 4 && !strcmp(argv[1], "whole")) {
        open_cold(argv[2], POSIX_FADV_SEQUENTIAL);
        printf("%s %.6f\n", argv[3], read_whole(atol(argv[3])));
    } else
        return 2;
    return 0;
}
