// SPDX-License-Identifier: GPL-2.0-only
/*
 * The walk: one pass over the page tables of a process that makes its private
 * anonymous pages copy-on-write and takes a reference to each.
 *
 * It holds what fork(2) holds: the address space for writing, each VMA, and
 * write_protect_seq, so that nothing faults, maps or pins meanwhile. Reclaim,
 * migration and the splitting of huge pages work by reverse mappings and under
 * the locks of page tables alone: those are taken for each table.
 *
 * A page with a reference and without AnonExclusive is copied by the next
 * write, in whatever process: that is all of the copy-on-write. Threads may go
 * on to write through their TLB until the flush, which comes before the lock is
 * released: the snapshot is of that moment.
 */
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/mm_inline.h>
#include <linux/mmu_notifier.h>
#include <linux/sched/coredump.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/swap.h>
#include <linux/swapops.h>

#include <asm/tlbflush.h>

#include "compat.h"
#include "internal.h"

/**
 * struct ckpt_walk - The state of a walk
 * @snap: what is filled
 * @mm: the memory
 * @incremental: leave out what has not changed since the base, and the bits tell
 * @clear: clear the soft-dirty bits and begin a new base
 * @base: the new base
 * @spare: a zeroed table that was not needed
 * @folio: the large folio of which a page was taken last
 * @folio_refs: references to it that this walk has taken since it took others;
 *	with one of them, it stays what it is
 */
struct ckpt_walk {
	struct ckpt_snapshot *snap;
	struct mm_struct *mm;
	bool incremental;
	bool clear;
	struct xarray base;
	unsigned long *spare;
	struct folio *folio;
	int folio_refs;
};

/* Mappings with memory that is not private to the process, or not memory. */
static bool ckpt_is_foreign(const struct vm_area_struct *vma)
{
	return vma->vm_flags & (VM_SHARED | VM_MAYSHARE | VM_HUGETLB | VM_PFNMAP | VM_MIXEDMAP | VM_IO) ||
	       ckpt_is_shadow_stack(vma);
}

/* Whether the VMA may have anonymous pages; page tables of others can vanish. */
static bool ckpt_has_pages(const struct vm_area_struct *vma)
{
	return !ckpt_is_foreign(vma) && vma->anon_vma;
}

/* References that mappings, the swap cache and the LRU do not explain. */
static int ckpt_unexplained(struct folio *folio, int refs, int mapcount)
{
	if (folio_test_swapcache(folio))
		refs -= folio_nr_pages(folio);
	/* On its way to the LRU or isolated from it: held by whoever does that. */
	if (!folio_test_lru(folio))
		refs--;
	return refs - mapcount;
}

/*
 * Whether somebody else may write to an exclusive page, as I/O in flight does,
 * behind the page tables. Called with the page write-protected: who has taken a
 * reference without a lock has done so before, and is seen here, or finds the
 * changed entry and gives it back.
 */
static bool ckpt_is_busy(struct ckpt_walk *walk, struct page *page, bool by_pmd)
{
	struct folio *folio = page_folio(page);
	int refs = folio_ref_count(folio);
	int mapcount, tries;

	/* Our references must not overflow it. */
	if (refs > INT_MAX / 2)
		return true;
	if (!folio_test_large(folio))
		return ckpt_unexplained(folio, refs, atomic_read(&folio->_mapcount) + 1) > 0;
	if (by_pmd && ckpt_unexplained(folio, refs, ckpt_pmd_mapcount(folio)) <= 0)
		return false;
	for (tries = 0; tries < 3; tries++) {
		refs = folio_ref_count(folio);
		smp_rmb(); /* references first: they outlive their mappings */
		mapcount = ckpt_large_mapcount(folio);
		smp_rmb(); /* unchanged around the count of the mappings */
		if (refs != folio_ref_count(folio))
			continue;
		if (walk->folio == folio)
			refs -= walk->folio_refs;
		return ckpt_unexplained(folio, refs, mapcount) > 0;
	}
	return true;
}

static void ckpt_take_page(struct ckpt_walk *walk, struct page *page)
{
	struct folio *folio = page_folio(page);

	folio_get(folio);
	if (!folio_test_large(folio))
		return;
	if (walk->folio != folio) {
		walk->folio = folio;
		walk->folio_refs = 0;
	}
	walk->folio_refs++;
}

/*
 * Write-protects an entry, and clears its soft-dirty bit if @clear. The
 * processor may set the accessed and dirty bits at the same time. Returns the
 * entry as it was.
 */
static pte_t ckpt_protect_pte(pte_t *ptep, bool clear)
{
	pte_t old = READ_ONCE(*ptep), new;

	do {
		new = pte_wrprotect(old);
		if (clear)
			new = pte_clear_soft_dirty(new);
	} while (!try_cmpxchg((long *)&ptep->pte, (long *)&old.pte, pte_val(new)));
	return old;
}

/*
 * Puts an entry back; what the processor has set since stays. Its page is one that
 * I/O may write to behind the page tables: if the bits are cleared, it stays dirty.
 */
static void ckpt_restore_pte(pte_t *ptep, pte_t to, bool clear)
{
	pte_t old = READ_ONCE(*ptep), new;

	if (clear)
		to = pte_mksoft_dirty(to);
	do {
		new = pte_young(old) ? pte_mkyoung(to) : to;
		/* Only if need be: it sets the soft-dirty bit, too. */
		if (pte_dirty(old) && !pte_dirty(to))
			new = pte_mkdirty(new);
	} while (!try_cmpxchg((long *)&ptep->pte, (long *)&old.pte, pte_val(new)));
}

static pmd_t ckpt_protect_pmd(pmd_t *pmdp, bool clear)
{
	pmd_t old = READ_ONCE(*pmdp), new;

	do {
		new = pmd_wrprotect(old);
		if (clear)
			new = pmd_clear_soft_dirty(new);
	} while (!try_cmpxchg((long *)pmdp, (long *)&old.pmd, pmd_val(new)));
	return old;
}

static void ckpt_restore_pmd(pmd_t *pmdp, pmd_t to, bool clear)
{
	pmd_t old = READ_ONCE(*pmdp), new;

	if (clear)
		to = pmd_mksoft_dirty(to);
	do {
		new = pmd_young(old) ? pmd_mkyoung(to) : to;
		if (pmd_dirty(old) && !pmd_dirty(to))
			new = pmd_mkdirty(new);
	} while (!try_cmpxchg((long *)pmdp, (long *)&old.pmd, pmd_val(new)));
}

/*
 * Whether the entries at @index have been in the same table since the base.
 * mremap(2) moves whole tables without touching the soft-dirty bits in them,
 * so that clean entries at another address say nothing about this one. A table
 * that lives since then cannot be taken for another; for one that was freed and
 * used again, see "Known limits" in README.md.
 */
static bool ckpt_same_table(struct ckpt_walk *walk, unsigned long index, unsigned long table)
{
	void *entry = xa_load(&walk->snap->space->base, index);

	return entry && xa_to_value(entry) == table;
}

/*
 * Whether all entries of the VMA in a table are dirty, whatever their bits. KSM
 * replaces a written page by a merged one and drops its soft-dirty bit.
 */
static bool ckpt_is_dirty(struct ckpt_walk *walk, struct vm_area_struct *vma, unsigned long index,
			  unsigned long table)
{
	return !walk->incremental || vma->vm_flags & (VM_SOFTDIRTY | VM_MERGEABLE) ||
	       !ckpt_same_table(walk, index, table);
}

/* One entry of a page table, under its lock: the entry of the snapshot. */
static inline unsigned long ckpt_walk_pte(struct ckpt_walk *walk, pte_t *ptep, bool dirty)
{
	pte_t pte = READ_ONCE(*ptep);
	unsigned long pfn;
	struct page *page;

	if (pte_none(pte))
		return 0;
	if (!pte_present(pte)) {
		swp_entry_t swap = pte_to_swp_entry(pte);

		/* Of userfaultfd, where there is no page. Other marks are left by one that was lost. */
		if (is_pte_marker_entry(swap) && !(pte_marker_get(swap) & ~PTE_MARKER_UFFD_WP))
			return 0;
		/* In swap after all, or being migrated. */
		return CKPT_KIND_COPY;
	}
	pfn = pte_pfn(pte);
	if (pte_special(pte))
		return is_zero_pfn(pfn) ? CKPT_KIND_ZERO : CKPT_KIND_COPY;
	if (pte_devmap(pte))
		return CKPT_KIND_COPY;
	/* What is not special has a struct page. */
	page = pfn_to_page(pfn);
	if (!PageAnon(page))
		return 0;
	if (is_zone_device_page(page))
		return CKPT_KIND_COPY;
	if (!dirty && !pte_soft_dirty(pte) && !pte_write(pte) && !PageKsm(page))
		return ckpt_entry(pfn, CKPT_KIND_SAME);
	pte = ckpt_protect_pte(ptep, walk->clear);
	if (PageAnonExclusive(page)) {
		if (ckpt_is_busy(walk, page, false)) {
			ckpt_restore_pte(ptep, pte, walk->clear);
			return CKPT_KIND_COPY;
		}
		ClearPageAnonExclusive(page);
	} else if (folio_ref_count(page_folio(page)) > INT_MAX / 2) {
		ckpt_restore_pte(ptep, pte, walk->clear);
		return CKPT_KIND_COPY;
	}
	ckpt_take_page(walk, page);
	return ckpt_entry(pfn, CKPT_KIND_DATA);
}

/* A PMD that maps a huge page, under its lock. */
static unsigned long ckpt_walk_huge(struct ckpt_walk *walk, struct vm_area_struct *vma, pmd_t *pmdp,
				    bool dirty)
{
	pmd_t pmd = READ_ONCE(*pmdp);
	struct page *page;

	if (pmd_devmap(pmd))
		return CKPT_KIND_COPY;
	page = pmd_page(pmd);
	if (!PageAnon(page))
		/* A page of the file, or the huge page of zeros. */
		return vma_is_anonymous(vma) ? CKPT_KIND_ZERO : 0;
	if (is_zone_device_page(page))
		return CKPT_KIND_COPY;
	if (!dirty && !pmd_soft_dirty(pmd) && !pmd_write(pmd))
		return ckpt_entry(pmd_pfn(pmd), CKPT_KIND_SAME);
	pmd = ckpt_protect_pmd(pmdp, walk->clear);
	if (PageAnonExclusive(page)) {
		if (ckpt_is_busy(walk, page, true)) {
			ckpt_restore_pmd(pmdp, pmd, walk->clear);
			return CKPT_KIND_COPY;
		}
		ClearPageAnonExclusive(page);
	} else if (folio_ref_count(page_folio(page)) > INT_MAX / 2) {
		ckpt_restore_pmd(pmdp, pmd, walk->clear);
		return CKPT_KIND_COPY;
	}
	ckpt_take_page(walk, page);
	return ckpt_entry(pmd_pfn(pmd), CKPT_KIND_DATA);
}

/* Counts @pages of the kind of @entry; those with references are charged. */
static inline int ckpt_count(struct ckpt_snapshot *snap, unsigned long entry, unsigned long pages)
{
	switch (ckpt_entry_kind(entry)) {
	case CKPT_KIND_SAME:
		snap->same += pages;
		break;
	case CKPT_KIND_ZERO:
		snap->zero += pages;
		break;
	case CKPT_KIND_COPY:
		snap->copy += pages;
		break;
	}
	return ckpt_entry_kind(entry) == CKPT_KIND_DATA;
}

/* Remembers in the new base which table has the entries at @index. */
static int ckpt_walk_base(struct ckpt_walk *walk, unsigned long index, unsigned long table)
{
	if (!walk->clear)
		return 0;
	return xa_err(xa_store(&walk->base, index, xa_mk_value(table), CKPT_GFP));
}

/*
 * A huge entry that is not a table. Returns 0, an error, or -EAGAIN if it has
 * become a table meanwhile.
 */
static int ckpt_walk_pmd(struct ckpt_walk *walk, struct vm_area_struct *vma, pud_t *pudp, pmd_t *pmdp,
			 unsigned long va)
{
	/* The table that holds the PMD, marked to differ from one below it. */
	unsigned long index = va >> PMD_SHIFT, table = pud_pfn(READ_ONCE(*pudp)) << 1 | 1;
	bool dirty = ckpt_is_dirty(walk, vma, index, table);
	struct ckpt_snapshot *snap = walk->snap;
	unsigned long entry;
	spinlock_t *ptl;
	pmd_t pmd;
	int err;

	/* Room for it first: there is none to be had under the lock. */
	err = xa_reserve(&snap->entries, index, CKPT_GFP);
	if (err)
		return err;
	err = ckpt_walk_base(walk, index, table);
	if (err)
		return err;
	ptl = pmd_lock(walk->mm, pmdp);
	pmd = READ_ONCE(*pmdp);
	if (pmd_none(pmd)) {
		entry = 0;
	} else if (is_swap_pmd(pmd)) {
		entry = CKPT_KIND_COPY;
	} else if (pmd_trans_huge(pmd) || pmd_devmap(pmd)) {
		entry = ckpt_walk_huge(walk, vma, pmdp, dirty);
	} else {
		spin_unlock(ptl);
		xa_release(&snap->entries, index);
		return -EAGAIN;
	}
	spin_unlock(ptl);
	if (!entry) {
		xa_release(&snap->entries, index);
		return 0;
	}
	xa_store(&snap->entries, index, xa_mk_value(entry), CKPT_GFP);
	if (!ckpt_count(snap, entry, HPAGE_PMD_NR))
		return 0;
	return ckpt_snapshot_charge(snap, HPAGE_PMD_NR);
}

/* The page table below a PMD, from @va to @end. Returns as ckpt_walk_pmd(). */
static int ckpt_walk_table(struct ckpt_walk *walk, struct vm_area_struct *vma, pmd_t *pmdp, pmd_t pmd,
			   unsigned long va, unsigned long end)
{
	unsigned long index = va >> PMD_SHIFT, table = pmd_pfn(pmd) << 1;
	bool dirty = ckpt_is_dirty(walk, vma, index, table);
	struct ckpt_snapshot *snap = walk->snap;
	unsigned long *entries = xa_load(&snap->entries, index);
	bool is_new = !entries, used = false;
	unsigned long taken = 0;
	spinlock_t *ptl;
	pte_t *ptep;
	int err;

	if (is_new) {
		entries = walk->spare;
		walk->spare = NULL;
		if (!entries)
			entries = (unsigned long *)get_zeroed_page(CKPT_GFP);
		if (!entries)
			return -ENOMEM;
		err = xa_err(xa_store(&snap->entries, index, entries, CKPT_GFP));
		if (err) {
			walk->spare = entries;
			return err;
		}
	}
	err = ckpt_walk_base(walk, index, table);
	if (err)
		return err;
	ptl = pte_lockptr(walk->mm, &pmd);
	ptep = pte_offset_kernel(&pmd, va);
	spin_lock(ptl);
	if (!pmd_same(pmd, READ_ONCE(*pmdp))) {
		err = -EAGAIN;
		end = va;
	}
	for (; va < end; va += PAGE_SIZE, ptep++) {
		unsigned long entry = ckpt_walk_pte(walk, ptep, dirty);

		if (!entry)
			continue;
		entries[pte_index(va)] = entry;
		taken += ckpt_count(snap, entry, 1);
		used = true;
	}
	spin_unlock(ptl);
	if (is_new && !used) {
		xa_erase(&snap->entries, index);
		walk->spare = entries;
	}
	return err ? err : ckpt_snapshot_charge(snap, taken);
}

/* The PMD of @va, or NULL if there is none until *@nextp. */
static pmd_t *ckpt_find_pmd(struct mm_struct *mm, unsigned long va, unsigned long end,
			    pud_t **pudpp, unsigned long *nextp)
{
	pgd_t *pgdp = pgd_offset(mm, va);
	p4d_t *p4dp;
	pud_t *pudp;

	*nextp = pgd_addr_end(va, end);
	if (pgd_none(*pgdp) || pgd_bad(*pgdp))
		return NULL;
	p4dp = p4d_offset(pgdp, va);
	*nextp = p4d_addr_end(va, end);
	if (p4d_none(*p4dp) || p4d_bad(*p4dp))
		return NULL;
	pudp = pud_offset(p4dp, va);
	*nextp = pud_addr_end(va, end);
	/* Nothing anonymous is mapped by a PUD. */
	if (pud_none(*pudp) || pud_bad(*pudp))
		return NULL;
	*pudpp = pudp;
	*nextp = pmd_addr_end(va, end);
	return pmd_offset(pudp, va);
}

static int ckpt_walk_vma(struct ckpt_walk *walk, struct vm_area_struct *vma)
{
	unsigned long va = vma->vm_start, next;

	while (va < vma->vm_end) {
		pud_t *pudp;
		pmd_t *pmdp = ckpt_find_pmd(walk->mm, va, vma->vm_end, &pudp, &next);
		pmd_t pmd = pmdp ? READ_ONCE(*pmdp) : __pmd(0);
		int err = 0;

		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
		if (is_swap_pmd(pmd) || pmd_trans_huge(pmd) || pmd_devmap(pmd))
			err = ckpt_walk_pmd(walk, vma, pudp, pmdp, va);
		else if (!pmd_none(pmd) && !pmd_bad(pmd))
			err = ckpt_walk_table(walk, vma, pmdp, pmd, va, next);
		/* It has become another kind of entry: once more. */
		if (err == -EAGAIN)
			continue;
		if (err)
			return err;
		va = next;
	}
	return 0;
}

/* The first address from @va on that is in swap, or the end of the VMA. */
static unsigned long ckpt_next_swapped(struct mm_struct *mm, struct vm_area_struct *vma, unsigned long va)
{
	unsigned long next;

	for (; va < vma->vm_end; va = next) {
		pud_t *pudp;
		pmd_t *pmdp = ckpt_find_pmd(mm, va, vma->vm_end, &pudp, &next);
		pmd_t pmd = pmdp ? READ_ONCE(*pmdp) : __pmd(0);
		spinlock_t *ptl;
		pte_t *ptep;

		cond_resched();
		if (pmd_none(pmd) || is_swap_pmd(pmd) || pmd_trans_huge(pmd) || pmd_devmap(pmd) ||
		    pmd_bad(pmd))
			continue;
		ptl = pte_lockptr(mm, &pmd);
		ptep = pte_offset_kernel(&pmd, va);
		spin_lock(ptl);
		/* A table that is not there any more has nothing in swap. */
		for (; va < next && pmd_same(pmd, READ_ONCE(*pmdp)); va += PAGE_SIZE, ptep++) {
			pte_t pte = READ_ONCE(*ptep);

			if (!pte_none(pte) && !pte_present(pte) && !non_swap_entry(pte_to_swp_entry(pte))) {
				spin_unlock(ptl);
				return va;
			}
		}
		spin_unlock(ptl);
	}
	return vma->vm_end;
}

/*
 * Brings in what is in swap. What cannot be, or is swapped out again before the
 * walk, will be of kind COPY.
 */
static int ckpt_swap_in(struct mm_struct *mm)
{
	struct vm_area_struct *vma;
	int err = 0;

	VMA_ITERATOR(vmi, mm, 0);

	if (mmap_read_lock_killable(mm))
		return -EINTR;
	for_each_vma(vmi, vma) {
		unsigned long va = vma->vm_start;

		if (!ckpt_has_pages(vma))
			continue;
		while ((va = ckpt_next_swapped(mm, vma, va)) < vma->vm_end) {
			if (fatal_signal_pending(current)) {
				err = -EINTR;
				goto out;
			}
			ckpt_fault_in(mm, va);
			va += PAGE_SIZE;
		}
	}
out:
	mmap_read_unlock(mm);
	return err;
}

/* Writes down the mappings that the walk leaves out. */
static int ckpt_list_foreign(struct ckpt_snapshot *snap, struct mm_struct *mm)
{
	struct vm_area_struct *vma;
	unsigned long nr = 0;

	VMA_ITERATOR(vmi, mm, 0);

	for_each_vma(vmi, vma)
		nr += ckpt_is_foreign(vma);
	if (!nr)
		return 0;
	/* As CKPT_GFP, with what kvmalloc knows of it. */
	snap->foreign = kvmalloc_array(nr, sizeof(*snap->foreign),
				       GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN);
	if (!snap->foreign)
		return -ENOMEM;
	vma_iter_init(&vmi, mm, 0);
	for_each_vma(vmi, vma) {
		if (!ckpt_is_foreign(vma))
			continue;
		snap->foreign[snap->nr_foreign].start = vma->vm_start;
		snap->foreign[snap->nr_foreign++].end = vma->vm_end;
		snap->nr_foreign_pages += vma_pages(vma);
	}
	return 0;
}

/*
 * The mapping of the kernel's variables below the vDSO. Snapshots take nothing of
 * it, so that its own soft-dirty flag is free to tell something: whoever clears the
 * bits takes the flag from every mapping, and nothing gives it back to this one.
 */
static struct vm_area_struct *ckpt_sentinel(struct mm_struct *mm)
{
	unsigned long vdso = (unsigned long)mm->context.vdso;
	struct vm_area_struct *vma = vdso ? vma_lookup(mm, vdso - 1) : NULL;

	return vma && (vma->vm_flags & (VM_PFNMAP | VM_MAYWRITE)) == VM_PFNMAP ? vma : NULL;
}

static void ckpt_flush_cpu(void *unused)
{
	__flush_tlb_all();
}

/*
 * flush_tlb_mm() is not for modules. A processor that has the memory loaded is
 * in the mask and flushes at once; one that comes back to it compares the
 * generation, and flushes then.
 */
static void ckpt_flush_tlb(struct mm_struct *mm)
{
	if (CKPT_SKIP_FLUSH)
		return;
	/* A full barrier: the entries are written before the mask is read. */
	atomic64_inc_return(&mm->context.tlb_gen);
	on_each_cpu_mask(mm_cpumask(mm), ckpt_flush_cpu, NULL, true);
}

/**
 * ckpt_walk() - Fills a snapshot
 * @snap: an empty snapshot
 * @mm: the memory, kept alive by the caller
 * @flags: CKPT_SNAPSHOT_*
 *
 * After an error the caller frees @snap. If the soft-dirty bits may have been
 * cleared by then, the generation has ended.
 *
 * Context: may sleep; holds the lock of the snapshot's space.
 * Return: 0, -EINTR, -EOPNOTSUPP, -ESTALE, -ESRCH, -ENOMEM, -EDQUOT or -ENOSPC.
 */
int ckpt_walk(struct ckpt_snapshot *snap, struct mm_struct *mm, u32 flags)
{
	struct ckpt_space *space = snap->space;
	struct ckpt_walk walk = {
		.snap = snap,
		.mm = mm,
		.incremental = flags & CKPT_SNAPSHOT_INCREMENTAL,
		.clear = flags & CKPT_SNAPSHOT_CLEAR,
	};
	struct vm_area_struct *vma, *sentinel = NULL;
	bool mergeable = false;
	u64 begin, flush;
	int err;

	VMA_ITERATOR(vmi, mm, 0);

	lockdep_assert_held(&space->lock);
	xa_init_flags(&walk.base, XA_FLAGS_ACCOUNT);
	if (ckpt_swap_entries(mm)) {
		err = ckpt_swap_in(mm);
		if (err)
			return err;
	}
	if (mmap_write_lock_killable(mm))
		return -EINTR;
	begin = ktime_get_ns();
	err = -EOPNOTSUPP;
	if (mm_has_notifiers(mm))
		goto unlock;
	if (flags) {
		sentinel = ckpt_sentinel(mm);
		if (!sentinel)
			goto unlock;
	}
	/* The bits are not those of the base. */
	err = -ESTALE;
	if (walk.incremental && !(sentinel->vm_flags & VM_SOFTDIRTY))
		goto unlock;
	/*
	 * KSM is or was at work. What it has given back since, 6.12 leaves clean
	 * and in a VMA that does not show it.
	 */
	mergeable = test_bit(MMF_VM_MERGEABLE, &mm->flags);
	if (mergeable || space->mergeable)
		walk.incremental = false;
	/* The OOM killer is taking it apart. */
	err = -ESRCH;
	if (test_bit(MMF_UNSTABLE, &mm->flags))
		goto unlock;
	err = ckpt_list_foreign(snap, mm);
	if (err)
		goto unlock;
	raw_write_seqcount_begin(&mm->write_protect_seq);
	inc_tlb_flush_pending(mm);
	for_each_vma(vmi, vma) {
		vma_start_write(vma);
		if (!ckpt_has_pages(vma))
			continue;
		err = ckpt_walk_vma(&walk, vma);
		if (err)
			break;
		/* What is new in it from now on is so by its own bits. */
		if (walk.clear)
			vm_flags_clear(vma, VM_SOFTDIRTY);
	}
	if (walk.clear && !err)
		vm_flags_set(sentinel, VM_SOFTDIRTY);
	flush = ktime_get_ns();
	ckpt_flush_tlb(mm);
	snap->ns_flush = ktime_get_ns() - flush;
	dec_tlb_flush_pending(mm);
	raw_write_seqcount_end(&mm->write_protect_seq);
unlock:
	mmap_write_unlock(mm);
	snap->ns_walk = ktime_get_ns() - begin;
	if (!walk.clear)
		goto out;
	xa_destroy(&space->base);
	if (err) {
		space->generation = 0;
		xa_destroy(&walk.base);
	} else {
		space->base = walk.base;
		space->mergeable = mergeable;
	}
out:
	free_page((unsigned long)walk.spare);
	return err;
}
