// SPDX-License-Identifier: MIT OR Apache-2.0
//! AIO contexts (io_setup(2)): the ring at its old address, with the events that nobody has taken yet.
//!
//! Requests in flight can't be saved, and how many there are the kernel does not tell: the ring counts those that have
//! completed, the interceptor those that were submitted ([`ckpt_abi::recorded`]). As a ring has room for all requests of its
//! context, the difference modulo its length is what is in flight. Where the interceptor has not counted, nothing is assumed.
//!
//! The kernel keeps the end of the ring itself, so a restore brings a new ring to where the old one was by requests that do nothing,
//! and then writes the old events over theirs.

use super::{At, Collect, Resource, decode, nothing_to_do};
use crate::dump::barrier::{Member, Pending};
use crate::error::{DumpError, Refusals, RestoreError};
use crate::kind::Kind;
use crate::model::Job;
use crate::model::memory::Vma;
use crate::model::process::Process;
use crate::model::watched::{recorded_table, table_of};
use crate::restore::build_tree::{Build, open_call};
use ckpt_abi::recorded::{self, AIO_SLOT_BYTES, AIO_SLOTS, AioCount};
use ckpt_image::Record;
use ckpt_image::codec::{Decode, Encode};
use ckpt_sys::memory::PAGE;
use ckpt_sys::{Errno, Pid, libc};

/// Version of [`AioRecord`].
pub const VERSION: u16 = 1;

/// Name of the mapping of a ring.
pub const RING_NAME: &str = "/[aio]";
/// What a ring begins with (`struct aio_ring`): id, number of events, head, tail, magic, features twice, length of this.
const HEADER_BYTES: u64 = 32;
const EVENT_BYTES: u64 = 32;
const MAGIC: u32 = 0xa10a_10a1;
/// Requests that a restore submits with one call.
const AT_ONCE: u32 = 4096;

/// A context. The record's owner is the pid, its id the address of the ring.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct AioRecord {
    /// Length of the ring in bytes.
    pub bytes: u64,
    /// Index of the first event that was not taken yet.
    pub head: u32,
    /// Index of the place for the next one.
    pub tail: u32,
    /// Those between (`struct io_event`).
    pub events: Vec<[u64; 4]>,
}

impl AioRecord {
    /// Places in the ring.
    fn places(&self) -> u32 {
        u32::try_from(self.bytes.saturating_sub(HEADER_BYTES) / EVENT_BYTES).unwrap_or(0)
    }
}

/// The kind.
#[derive(Debug)]
pub struct AioResource;

/// Whether a mapping is the ring of a context, or what a child has from its parent's.
pub fn is_ring(v: &Vma) -> bool {
    v.deleted && v.name == RING_NAME
}

/// The ring of a context as it is now.
struct Ring {
    places: u32,
    head: u32,
    tail: u32,
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().unwrap_or_default()))
}

/// Reads the header of a ring; none if it isn't one.
fn parse_ring(header: &[u8; HEADER_BYTES as usize]) -> Option<Ring> {
    let mut w = [0u32; 8];
    w.iter_mut().zip(words(header)).for_each(|(to, from)| *to = from);
    let [_, places, head, tail, magic, _, _, length] = w;
    let sound = magic == MAGIC && u64::from(length) == HEADER_BYTES && head < places && tail < places;
    sound.then_some(Ring { places, head, tail })
}

/// How many requests are in flight.
fn in_flight(ring: &Ring, submitted: u64) -> u32 {
    let places = u64::from(ring.places);
    ((submitted % places + places - u64::from(ring.tail)) % places) as u32
}

/// What the interceptor has counted in a process.
fn counts(p: &Process) -> Vec<AioCount> {
    let table = recorded_table(p, 3, AIO_SLOTS * AIO_SLOT_BYTES).unwrap_or_default();
    recorded::contexts(&table).collect()
}

/// Whether the process has inherited the ring's memory from its parent, whose the context is.
pub fn is_inherited(p: &Process, v: &Vma) -> bool {
    counts(p).iter().any(|c| c.context == v.start && c.pid != p.pid as u64)
}

/// The ring at a mapping, with what is wrong with it.
fn look(p: &Process, v: &Vma) -> Result<Ring, &'static str> {
    let mut header = [0; HEADER_BYTES as usize];
    ckpt_sys::memory::read(p.host, v.start, &mut header).map_err(|_| "that can't be read")?;
    let ring = parse_ring(&header).filter(|r| {
        v.offset == 0
            && v.shared
            && v.prot == libc::PROT_READ | libc::PROT_WRITE
            && u64::from(r.places) == (v.bytes() - HEADER_BYTES) / EVENT_BYTES
    });
    ring.ok_or("whose ring is not as the kernel has made it")
}

/// Contexts with requests in flight, for the barrier.
pub fn pending(member: &Member<'_>) -> Vec<Pending> {
    let table = member.word.and_then(|w| table_of(w, 3, AIO_SLOTS * AIO_SLOT_BYTES)).unwrap_or_default();
    let mut out = Vec::new();
    for c in recorded::contexts(&table).filter(|c| c.pid == crate::dump::barrier::inner(member.host) as u64) {
        let mut header = [0; HEADER_BYTES as usize];
        let ring = member.word.and_then(|w| w.read_memory(c.context, &mut header).ok());
        // One whose ring is gone has been destroyed.
        let Some(ring) = ring.and_then(|()| parse_ring(&header)) else { continue };
        let n = in_flight(&ring, c.submitted);
        if n > 0 || c.busy > 0 {
            out.push(Pending { task: member.host, what: what(c.context, n) });
        }
    }
    out
}

fn what(context: u64, n: u32) -> String {
    match n {
        0 => format!("the submission of requests to AIO context {context:#x}"),
        _ => format!("asynchronous I/O, {n} requests of AIO context {context:#x},"),
    }
}

/// Submits requests that do nothing to the descriptor `null` of /dev/null, and takes their events if they are to be `taken`.
fn advance(
    cx: &mut Build<'_>,
    pid: i32,
    context: u64,
    null: u64,
    count: u32,
    taken: bool,
) -> Result<(), RestoreError> {
    let mut left = count;
    while left > 0 {
        let n = left.min(AT_ONCE);
        let (results, submit) = cx.run(pid, |b| {
            // struct iocb: data, key and flags, operation (0: IOCB_CMD_PREAD), priority and descriptor, buffer, bytes,
            // offset, reserved, flags.
            let request = b.words(&[0, 0, null << 32, 0, 0, 0, 0, 0]);
            let list = b.words(&vec![request; n as usize]);
            let events = b.words(&vec![0; if taken { 4 * n as usize } else { 0 }]);
            let submit = b.call("io_submit", libc::SYS_io_submit, &[context, u64::from(n), list]);
            if taken {
                let take = b.call("io_getevents", libc::SYS_io_getevents, &[context, 0, 0, events, 0]);
                b.feed(submit, take, 1);
                b.feed(submit, take, 2);
            }
            submit
        })?;
        // Fewer are taken at once where the kernel keeps some for other CPUs.
        let done = u32::try_from(results[submit.index()]).unwrap_or(0);
        if done == 0 {
            return Err(RestoreError::Host(format!(
                "an AIO context of process {pid} takes no more requests"
            )));
        }
        left = left.saturating_sub(done);
    }
    Ok(())
}

impl Resource for AioResource {
    nothing_to_do! { claims, asks, content, connect, finish, arm }

    fn kind(&self) -> Kind {
        Kind::Aio
    }

    fn after(&self) -> &'static [Kind] {
        &[Kind::MemoryMap]
    }

    fn probe(&self, job: &Job, refusals: &mut Refusals) {
        for p in job.live().filter(|p| !p.closed) {
            let rings: Vec<&Vma> = p.vmas.iter().filter(|v| is_ring(v)).collect();
            let counts = if rings.is_empty() { Vec::new() } else { counts(p) };
            for v in rings {
                let context = v.start;
                match (counts.iter().find(|c| c.context == context), look(p, v)) {
                    (Some(c), _) if c.pid != p.pid as u64 => {}
                    (_, Err(wrong)) => {
                        refusals.process(
                            p.pid,
                            format!("AIO context {context:#x}, {wrong}"),
                            "not supported",
                        );
                    }
                    (None, Ok(_)) => refusals.process(
                        p.pid,
                        format!(
                            "AIO context {context:#x}: nobody knows how many of its requests are in flight"
                        ),
                        "start the job with the interceptor, which counts those of libaio and syscall(2)",
                    ),
                    (Some(c), Ok(ring)) => {
                        let n = in_flight(&ring, c.submitted);
                        if n > 0 || c.busy > 0 {
                            let advice = "dump again when it is over";
                            refusals.passing(
                                p.pid,
                                None,
                                format!("{} is under way", what(context, n)),
                                advice,
                            );
                        }
                    }
                }
            }
        }
    }

    fn collect(&self, cx: &mut Collect<'_>, at: At<'_>) -> Result<(), DumpError> {
        let At::Process(p) = at else { return Ok(()) };
        for v in p.vmas.iter().filter(|v| is_ring(v)) {
            let strange = |what: &str| DumpError::Process {
                pid: p.pid,
                what: format!("AIO context {:#x}", v.start),
                source: std::io::Error::other(what.to_owned()),
            };
            // Takes no event, and tells whether there is such a context.
            let alive = cx.live().raw(libc::SYS_io_getevents, [v.start, 0, 0, 0, 0, 0])?;
            let inherited = is_inherited(p, v);
            if alive != if inherited { -i64::from(libc::EINVAL) } else { 0 } {
                return Err(strange("it is not what the interceptor has recorded"));
            }
            if inherited {
                continue;
            }
            let ring = look(p, v).map_err(strange)?;
            let err = DumpError::errno(p.pid, "reading an AIO ring");
            let mut bytes = vec![0u8; (v.bytes() - HEADER_BYTES) as usize];
            ckpt_sys::memory::read(p.host, v.start + HEADER_BYTES, &mut bytes).map_err(err)?;
            let event = |i: u32| {
                let at = (u64::from(i) * EVENT_BYTES) as usize;
                std::array::from_fn(|w| {
                    u64::from_le_bytes(bytes[at + 8 * w..at + 8 * w + 8].try_into().unwrap_or_default())
                })
            };
            let unread = (ring.tail + ring.places - ring.head) % ring.places;
            let events = (0..unread).map(|i| event((ring.head + i) % ring.places)).collect();
            let record = AioRecord { bytes: v.bytes(), head: ring.head, tail: ring.tail, events };
            cx.put(Kind::Aio, VERSION, p.pid as u64, v.start, &record)?;
        }
        Ok(())
    }

    fn describe(&self, record: &Record) -> Result<String, RestoreError> {
        let a: AioRecord = decode(record, VERSION)?;
        Ok(format!("AIO context {:#x}, {} events not taken", record.id, a.events.len()))
    }

    fn create(&self, cx: &mut Build<'_>, record: &Record) -> Result<(), RestoreError> {
        let a: AioRecord = decode(record, VERSION)?;
        let (pid, address, places) = (record.owner as i32, record.id, a.places());
        let unread = a.events.len() as u32;
        let sound = a.bytes.is_multiple_of(PAGE)
            && a.head < places
            && a.tail < places
            && unread == (a.tail + places - a.head) % places;
        if !sound {
            return Err(RestoreError::Record(format!(
                "process {pid} has an impossible AIO context {address:#x}"
            )));
        }
        // The fewest requests for which the kernel makes a ring of this length: it has room for twice as many, and two.
        let pages = a.bytes / PAGE;
        let requests = (64 * pages).saturating_sub(65).max(1);
        let mut b = cx.area.batch();
        let context = b.words(&[0]);
        b.call("io_setup (fs.aio-max-nr is the limit)", libc::SYS_io_setup, &[requests, context]);
        let (results, b) = b.run_raw(Pid::from_raw(pid)).map_err(RestoreError::remote(pid))?;
        let mut new = [0; 8];
        b.read(context, &mut new);
        if let Some(e) = results.first().filter(|r| **r < 0) {
            let what = "io_setup (fs.aio-max-nr is the limit)";
            return Err(RestoreError::errno(pid, what.to_owned())(Errno::from_raw(-*e as i32)));
        }
        let new = u64::from_le_bytes(new);
        let mut header = [0; HEADER_BYTES as usize];
        let err = |what: &str| RestoreError::errno(pid, what.to_owned());
        ckpt_sys::memory::read(Pid::from_raw(pid), new, &mut header).map_err(err("reading an AIO ring"))?;
        if parse_ring(&header).is_none_or(|r| r.places != places) {
            return Err(RestoreError::Host(format!(
                "AIO rings of {} bytes, as process {pid} has one, are not made here: they depend on the number of CPUs",
                a.bytes
            )));
        }
        // The kernel follows: from then on this is the name of the context.
        let moving = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        cx.call(pid, "moving an AIO ring", libc::SYS_mremap, &[new, a.bytes, a.bytes, moving, address])?;
        let null = cx.open_in(pid, |b| open_call(b, b"/dev/null", libc::O_RDONLY))? as u64;
        advance(cx, pid, address, null, a.head, true)?;
        advance(cx, pid, address, null, unread, false)?;
        cx.call(pid, "close", libc::SYS_close, &[null])?;
        for (i, event) in a.events.iter().enumerate() {
            let index = (u64::from(a.head) + i as u64) % u64::from(places);
            let bytes: Vec<u8> = event.iter().flat_map(|w| w.to_le_bytes()).collect();
            let at = address + HEADER_BYTES + index * EVENT_BYTES;
            ckpt_sys::memory::write(Pid::from_raw(pid), at, &bytes).map_err(err("writing an AIO ring"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_flight_is_submitted_and_not_completed() {
        let ring = |tail| Ring { places: 127, head: 0, tail };
        assert_eq!(in_flight(&ring(0), 0), 0);
        assert_eq!(in_flight(&ring(0), 3), 3);
        assert_eq!(in_flight(&ring(3), 127 * 9 + 3), 0);
        assert_eq!(in_flight(&ring(126), 127 * 9 + 3), 4);
    }

    #[test]
    fn only_what_is_a_ring_is_taken_for_one() {
        let header = |w: [u32; 8]| {
            let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
            parse_ring(bytes.as_slice().try_into().unwrap()).is_some()
        };
        assert!(header([0, 127, 1, 2, MAGIC, 1, 0, 32]));
        assert!(!header([0, 127, 127, 2, MAGIC, 1, 0, 32]));
        assert!(!header([0, 127, 1, 127, MAGIC, 1, 0, 32]));
        assert!(!header([0, 127, 1, 2, 0, 1, 0, 32]));
        assert!(!header([0, 0, 0, 0, MAGIC, 1, 0, 32]));
    }
}
