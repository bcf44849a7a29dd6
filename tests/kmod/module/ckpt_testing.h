/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/* Interface of /dev/ckpt_testing. */
#ifndef CKPT_TESTING_H
#define CKPT_TESTING_H

#include <linux/ioctl.h>

/* Registers an MMU notifier on the caller's memory, until the file is closed. */
#define CKPT_TESTING_NOTIFIER _IO(0xD8, 0)
/* Takes a page at the address in the argument for I/O, as drivers do. */
#define CKPT_TESTING_GET _IO(0xD8, 1) /* by reference, as old drivers do */
#define CKPT_TESTING_PIN _IO(0xD8, 2)
/* The device writes the byte in the argument to all of that page. */
#define CKPT_TESTING_WRITE _IO(0xD8, 3)
/* Gives it back. Closing does so too. */
#define CKPT_TESTING_END _IO(0xD8, 4)
/* Locks the caller's memory, as a fault that waits for a disk, and waits for UNLOCK. */
#define CKPT_TESTING_LOCK _IO(0xD8, 5)
#define CKPT_TESTING_IS_LOCKED _IO(0xD8, 6)
#define CKPT_TESTING_UNLOCK _IO(0xD8, 7)

#endif /* CKPT_TESTING_H */
