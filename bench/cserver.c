/* A FUSE server to compare with: libfuse's low-level API, one thread, everything from one flat file and a table in
 * memory. It does what any server must and nothing else: one hash lookup, one pread, one reply.
 *
 * cserver MOUNTPOINT DATA SIZE NAMES: `big` is the first SIZE bytes of DATA, `names/` has the files f000000 and so on.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 35
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BIG = 2, NAMES = 3, FIRST = 4, NAME_SIZE = 8, MAX_READ = 1 << 20 };

static int data;
static off_t big_size;
static uint32_t count, slots;
static char (*names)[NAME_SIZE];
static uint32_t *table; /* number of the name + 1; 0 is empty */
static char buffer[MAX_READ];

static uint32_t hash(const char *name) {
    uint32_t value = 2166136261u;
    for (; *name; name++)
        value = (value ^ (unsigned char)*name) * 16777619u;
    return value;
}

static void fill_table(void) {
    for (slots = 16; slots < 2 * count; slots *= 2)
        ;
    names = calloc(count ? count : 1, NAME_SIZE);
    table = calloc(slots, sizeof *table);
    if (!names || !table)
        exit(1);
    for (uint32_t i = 0; i < count; i++) {
        snprintf(names[i], NAME_SIZE, "f%06u", i % 1000000u);
        uint32_t at = hash(names[i]) & (slots - 1);
        while (table[at])
            at = (at + 1) & (slots - 1);
        table[at] = i + 1;
    }
}

static fuse_ino_t find(fuse_ino_t parent, const char *name) {
    if (parent == FUSE_ROOT_ID)
        return !strcmp(name, "big") ? BIG : !strcmp(name, "names") ? NAMES : 0;
    for (uint32_t at = hash(name) & (slots - 1); table[at]; at = (at + 1) & (slots - 1))
        if (!strcmp(names[table[at] - 1], name))
            return FIRST + table[at] - 1;
    return 0;
}

static void describe(fuse_ino_t ino, struct stat *st) {
    memset(st, 0, sizeof *st);
    st->st_ino = ino;
    st->st_blksize = 4096;
    st->st_nlink = 1;
    st->st_mode = ino == FUSE_ROOT_ID || ino == NAMES ? S_IFDIR | 0755 : S_IFREG | 0644;
    st->st_size = ino == BIG ? big_size : 0;
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name) {
    struct fuse_entry_param entry = {.ino = find(parent, name), .attr_timeout = 1e6, .entry_timeout = 1e6};
    describe(entry.ino, &entry.attr);
    fuse_reply_entry(req, &entry);
}

static void on_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    struct stat st;
    (void)fi;
    describe(ino, &st);
    fuse_reply_attr(req, &st, 1e6);
}

static void on_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    (void)ino;
    fi->keep_cache = 1;
    fuse_reply_open(req, fi);
}

static void on_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi) {
    (void)fi;
    off_t left = ino == BIG && off < big_size ? big_size - off : 0;
    if ((off_t)size > left)
        size = left;
    ssize_t got = pread(data, buffer, size < MAX_READ ? size : MAX_READ, off);
    if (got < 0)
        fuse_reply_err(req, errno);
    else
        fuse_reply_buf(req, buffer, got);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = on_lookup, .getattr = on_getattr, .open = on_open, .read = on_read};

int main(int argc, char **argv) {
    if (argc != 5)
        return 2;
    data = open(argv[2], O_RDONLY | O_CLOEXEC);
    big_size = atoll(argv[3]);
    count = strtoul(argv[4], NULL, 10);
    if (data < 0 || count > 1000000u)
        return 1;
    fill_table();
    char *options[] = {argv[0], "-oro,allow_other,default_permissions,fsname=cserver"};
    struct fuse_args args = FUSE_ARGS_INIT(2, options);
    struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, NULL);
    if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, argv[1]))
        return 1;
    int result = fuse_session_loop(session);
    fuse_session_unmount(session);
    return result != 0;
}
