/* SPDX-License-Identifier: GPL-2.0-only */
/* Tracepoints ckpt:ckpt_snapshot_begin and ckpt:ckpt_snapshot_end. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM ckpt

#if !defined(CKPT_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define CKPT_TRACE_H

#include <linux/tracepoint.h>

#include "internal.h"

TRACE_EVENT(ckpt_snapshot_begin,
	TP_PROTO(u64 session, u32 flags),
	TP_ARGS(session, flags),
	TP_STRUCT__entry(
		__field(u64, session)
		__field(u32, flags)
	),
	TP_fast_assign(
		__entry->session = session;
		__entry->flags = flags;
	),
	TP_printk("session=%llu flags=%#x", __entry->session, __entry->flags)
);

TRACE_EVENT(ckpt_snapshot_end,
	TP_PROTO(u64 session, int error, const struct ckpt_snapshot_args *args),
	TP_ARGS(session, error, args),
	TP_STRUCT__entry(
		__field(u64, session)
		__field(int, error)
		__field(u64, data)
		__field(u64, same)
		__field(u64, zero)
		__field(u64, copy)
		__field(u64, ns_walk)
		__field(u64, ns_flush)
	),
	TP_fast_assign(
		__entry->session = session;
		__entry->error = error;
		__entry->data = args->pages_data;
		__entry->same = args->pages_same;
		__entry->zero = args->pages_zero;
		__entry->copy = args->pages_copy;
		__entry->ns_walk = args->ns_walk;
		__entry->ns_flush = args->ns_flush;
	),
	TP_printk("session=%llu error=%d data=%llu same=%llu zero=%llu copy=%llu ns_walk=%llu ns_flush=%llu",
		  __entry->session, __entry->error, __entry->data, __entry->same, __entry->zero,
		  __entry->copy, __entry->ns_walk, __entry->ns_flush)
);

#endif /* CKPT_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
