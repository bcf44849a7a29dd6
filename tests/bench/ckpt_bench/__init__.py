# SPDX-License-Identifier: MIT OR Apache-2.0
"""The bench of ckpt: what dump, restore and run cost, beside what the machine needs for the same work."""
