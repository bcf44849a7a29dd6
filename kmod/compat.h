/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that the module has been proven on. The
 * walk relies on the internals of page tables, so that an unknown kernel is
 * refused: read its mm/memory.c (copy_present_ptes) and mm/huge_memory.c
 * first, run scripts/vm on it, then add it to Kbuild.
 */
#ifndef CKPT_COMPAT_H
#define CKPT_COMPAT_H

#include <linux/huge_mm.h>
#include <linux/mm.h>
#include <linux/pagemap.h>

#if !defined(CONFIG_X86_64)
#error "ckpt: only x86-64 is supported"
#endif

#if defined(CKPT_LINUX_6_1)

static inline void vma_start_write(struct vm_area_struct *vma)
{
	/* No locks of single VMAs yet. */
}

static inline void vm_flags_set(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags |= flags;
}

static inline void vm_flags_clear(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags &= ~flags;
}

static inline bool ckpt_is_shadow_stack(const struct vm_area_struct *vma)
{
	return false;
}

static inline long ckpt_swap_entries(struct mm_struct *mm)
{
	return atomic_long_read(&mm->rss_stat.count[MM_SWAPENTS]);
}

static inline long ckpt_fault_in(struct mm_struct *mm, unsigned long va)
{
	return get_user_pages_remote(mm, va, 1, FOLL_FORCE, NULL, NULL, NULL);
}

static inline int ckpt_large_mapcount(struct folio *folio)
{
	int nr = folio_nr_pages(folio), count = folio_entire_mapcount(folio), i;

	for (i = 0; i < nr; i++)
		count += atomic_read(&folio_page(folio, i)->_mapcount) + 1;
	/* Mapped both ways, each page counts one more than its mappings. */
	return folio_test_double_map(folio) ? count - nr : count;
}

/* Not more than the mappings of a folio that a PMD maps, found at once. */
static inline int ckpt_pmd_mapcount(struct folio *folio)
{
	return folio_entire_mapcount(folio);
}

#elif defined(CKPT_LINUX_6_12)

static inline bool ckpt_is_shadow_stack(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_SHADOW_STACK;
}

static inline long ckpt_swap_entries(struct mm_struct *mm)
{
	return percpu_counter_sum_positive(&mm->rss_stat[MM_SWAPENTS]);
}

static inline long ckpt_fault_in(struct mm_struct *mm, unsigned long va)
{
	return get_user_pages_remote(mm, va, 1, FOLL_FORCE, NULL, NULL);
}

static inline int ckpt_large_mapcount(struct folio *folio)
{
	return folio_mapcount(folio);
}

static inline int ckpt_pmd_mapcount(struct folio *folio)
{
	return folio_mapcount(folio);
}

#else
#error "ckpt: this kernel is not known to work; see compat.h"
#endif

#endif /* CKPT_COMPAT_H */
