// SPDX-License-Identifier: MIT OR Apache-2.0
/* A file of /dev/shm that keeps its name: found again by name, with its content. */
#include "mem_pattern.h"

#include <sys/mman.h>
#include <sys/stat.h>

int main(int argc, char **argv)
{
	char name[64], unmapped[64], sub[64], path[128], page[PAGE_BYTES], *p;
	struct stat before, after;
	int fd;

	pattern_begin(argc, argv);
	snprintf(name, sizeof(name), "/guest-%s", guest.nonce);
	snprintf(unmapped, sizeof(unmapped), "/guest-%s.unmapped", guest.nonce);
	snprintf(sub, sizeof(sub), "/dev/shm/guest-%s.d", guest.nonce);
	fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0640);
	GUEST_CHECK(fd >= 0 && ftruncate(fd, 4 * PAGE_BYTES) == 0, "shm_open: %s", strerror(errno));
	GUEST_CHECK(fchmod(fd, 0640) == 0 && fstat(fd, &before) == 0, "fchmod: %s", strerror(errno));
	p = mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	GUEST_CHECK(p != MAP_FAILED, "mmap: %s", strerror(errno));
	close(fd);
	pattern_fill(p, 2 * PAGE_BYTES, guest_seed);
	/* Neither open nor mapped: it lives in the job's private /dev/shm alone. */
	fd = shm_open(unmapped, O_RDWR | O_CREAT | O_EXCL, 0600);
	pattern_fill(page, PAGE_BYTES, guest_seed + 1);
	GUEST_CHECK(fd >= 0 && write(fd, page, PAGE_BYTES) == (ssize_t)PAGE_BYTES, "write: %s", strerror(errno));
	close(fd);
	GUEST_CHECK(mkdir(sub, 0700) == 0, "mkdir %s: %s", sub, strerror(errno));
	snprintf(path, sizeof(path), "%s/link", sub);
	GUEST_CHECK(symlink("target", path) == 0, "symlink %s: %s", path, strerror(errno));

	guest_ready();
	guest_wait_go();

	CHECK_PATTERN("named file of /dev/shm", p, 2 * PAGE_BYTES, guest_seed);
	fd = shm_open(name, O_RDWR, 0);
	GUEST_CHECK(fd >= 0, "shm_open %s: %s", name, strerror(errno));
	GUEST_CHECK(fstat(fd, &after) == 0 && after.st_mode == before.st_mode && after.st_size == before.st_size,
		    "mode and size: expected %o %ld, got %o %ld", before.st_mode, (long)before.st_size,
		    after.st_mode, (long)after.st_size);
	GUEST_CHECK(pwrite(fd, "named", 5, 3 * PAGE_BYTES) == 5, "pwrite: %s", strerror(errno));
	GUEST_CHECK(memcmp(p + 3 * PAGE_BYTES, "named", 5) == 0, "the name leads to another file than the mapping");
	close(fd);
	fd = shm_open(unmapped, O_RDONLY, 0);
	GUEST_CHECK(fd >= 0 && read(fd, page, PAGE_BYTES) == (ssize_t)PAGE_BYTES, "unmapped file of /dev/shm: %s",
		    strerror(errno));
	CHECK_PATTERN("unmapped file of /dev/shm", page, PAGE_BYTES, guest_seed + 1);
	GUEST_CHECK(readlink(path, page, PAGE_BYTES) == 6 && memcmp(page, "target", 6) == 0,
		    "symbolic link in /dev/shm is lost");
	unlink(path);
	rmdir(sub);
	shm_unlink(name);
	shm_unlink(unmapped);
	guest_ok();
}
