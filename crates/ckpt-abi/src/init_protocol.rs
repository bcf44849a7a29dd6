// SPDX-License-Identifier: MIT OR Apache-2.0
//! The protocol between a job's init (pid 1 of the job) and whoever talks to it.
//!
//! Transport: a Unix `SOCK_SEQPACKET` socket, one message a packet. Every message is a fixed header of
//! [`HEADER_BYTES`] bytes, little-endian, followed by `payload_bytes` bytes of payload:
//!
//! | offset | size | field |
//! |-------:|-----:|-------|
//! | 0 | 4 | magic, [`MAGIC`] |
//! | 4 | 2 | version of the protocol, [`VERSION`] |
//! | 6 | 2 | kind, see [`Kind`] |
//! | 8 | 8 | argument, signed; its meaning depends on the kind |
//! | 16 | 4 | `payload_bytes` |
//! | 20 | 4 | reserved, zero |
//!
//! A running job outlives an upgrade of ckpt, so that both ends may be of different age. A kind that init
//! does not know is answered by [`Kind::Error`] and leaves the connection open; a header that is not
//! understood (magic, version, length) is answered by [`Kind::Error`] and ends the connection.
//!
//! Limits: a payload is at most [`MAX_PAYLOAD_BYTES`].

/// First four bytes of every message: "CKPI" read as a little-endian number.
pub const MAGIC: u32 = u32::from_le_bytes(*b"CKPI");
/// The version spoken by this build.
pub const VERSION: u16 = 1;
/// Size of the encoded header in bytes.
pub const HEADER_BYTES: usize = 24;
/// Largest payload in bytes. Well below the default socket buffer, so that a message is never refused for
/// its size by the kernel.
pub const MAX_PAYLOAD_BYTES: usize = 96 * 1024;
/// Most descriptors in one message. The kernel's limit is 253 (SCM_MAX_FD).
pub const MAX_DESCRIPTORS: usize = 200;

/// What a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[non_exhaustive]
pub enum Kind {
    /// Request: describe the job. Answered by [`Kind::StatusReply`].
    Status = 0x0001,
    /// Request: deliver the signal `arg & 0xff` with the scope `arg >> 8` (see [`KillScope`]). Answered by
    /// [`Kind::Done`] or [`Kind::Error`].
    Kill = 0x0002,
    /// Request: tell when the main process has ended (`arg` 0) or the whole job (`arg` 1). Answered by
    /// [`Kind::Exited`], possibly much later.
    Wait = 0x0003,
    /// Request: become the job's terminal. `arg` is the window size, see [`WindowSize::to_arg`], or 0 to
    /// leave it. Answered by [`Kind::Done`], then [`Kind::Data`] flows both ways. Whoever was attached before gets
    /// [`Kind::Detached`].
    Attach = 0x0004,
    /// Request, from the attached client: the window has the size `arg`. No answer.
    Resize = 0x0005,
    /// Request: stop being the job's terminal. Answered by [`Kind::Done`].
    Detach = 0x0006,
    /// Request: keep the descriptors that come with the message (SCM_RIGHTS, at most [`MAX_DESCRIPTORS`]) and the payload, which init
    /// does not look into, until they are asked for. `arg` is 1 if more of the same follows, 0 with the last: only then do they take the
    /// place of what was kept before, and if the connection ends before, all is dropped. Answered by [`Kind::Done`].
    Keep = 0x0007,
    /// Request: give what is kept. With `arg` 0 it is given away, with 1 a copy stays. Answered by one [`Kind::Kept`] for each part,
    /// then [`Kind::Done`].
    Take = 0x0008,
    /// Request: tell me of every signal that is to make a dump ([`Kind::DumpSignal`]), also of those that came before
    /// anybody asked. Answered by [`Kind::Done`]. The latest who asks is told.
    Supervise = 0x0009,
    /// Request: tell when nothing of the job depends on the checkpoint any more that it was restored from; until then memory is fetched
    /// as fast as possible. Answered by [`Kind::Done`], possibly much later.
    Settle = 0x000a,
    /// Bytes of the terminal, in both directions, in the payload. No answer.
    Data = 0x0010,

    /// Reply: the request has been carried out; `arg` depends on the request.
    Done = 0x8000,
    /// Reply: it has not; `arg` is an errno or 0, the payload says why, for a person (UTF-8).
    Error = 0x8001,
    /// Reply to [`Kind::Status`]: a JSON object.
    StatusReply = 0x8002,
    /// Reply to [`Kind::Wait`]: `arg` is the wait status of the main process as `waitpid(2)` gives it, or -1 if
    /// it is not known.
    Exited = 0x8003,
    /// Notice: another client is the job's terminal now.
    Detached = 0x8004,
    /// Reply to [`Kind::Take`]: a part, with its descriptors, as it came with [`Kind::Keep`].
    Kept = 0x8005,
    /// Notice to whoever supervises: signal `arg` was sent to the job and did not reach it, as it is to make a dump.
    DumpSignal = 0x8006,
    /// Notice, to who waits or is attached: why the job is being ended; UTF-8.
    Notice = 0x8007,

    /// Start, to the launching process: a line of progress, UTF-8.
    LaunchProgress = 0x9000,
    /// Start: something does not work as it should, and the job starts all the same; UTF-8.
    LaunchWarning = 0x9001,
    /// Start: from here on the job lives on its own; `arg` is unused.
    LaunchCommitted = 0x9002,
    /// Start: the job runs; `arg` is the pid of its main process inside the job, the payload JSON about the start.
    LaunchStarted = 0x9003,
    /// Start: it failed; `arg` is the class of the failure, the payload says why (UTF-8).
    LaunchFailed = 0x9004,
}

impl Kind {
    /// Every kind that this build knows.
    pub const ALL: [Kind; 24] = [
        Kind::Status,
        Kind::Kill,
        Kind::Wait,
        Kind::Attach,
        Kind::Resize,
        Kind::Detach,
        Kind::Keep,
        Kind::Take,
        Kind::Supervise,
        Kind::Settle,
        Kind::Data,
        Kind::Done,
        Kind::Error,
        Kind::StatusReply,
        Kind::Exited,
        Kind::Detached,
        Kind::Kept,
        Kind::DumpSignal,
        Kind::Notice,
        Kind::LaunchProgress,
        Kind::LaunchWarning,
        Kind::LaunchCommitted,
        Kind::LaunchStarted,
        Kind::LaunchFailed,
    ];

    /// The kind with this number, or `None` if this build does not know it.
    pub fn from_number(number: u16) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u16 == number)
    }
}

/// Whom a signal reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum KillScope {
    /// The terminal's foreground process group if the job has a terminal, else the process group of the main
    /// process; every process once the main process has ended. `SIGKILL` always reaches every process.
    Job = 0,
    /// The main process alone.
    Main = 1,
    /// Every process of the job.
    Everything = 2,
}

impl KillScope {
    /// The scope with this number.
    pub fn from_number(number: u8) -> Option<KillScope> {
        match number {
            0 => Some(KillScope::Job),
            1 => Some(KillScope::Main),
            2 => Some(KillScope::Everything),
            _ => None,
        }
    }
}

/// The argument of [`Kind::Kill`].
pub fn kill_arg(signal: u8, scope: KillScope) -> i64 {
    i64::from(signal) | (i64::from(scope as u8) << 8)
}

/// Signal and scope out of the argument of [`Kind::Kill`]; `None` if it is none.
pub fn parse_kill_arg(arg: i64) -> Option<(u8, KillScope)> {
    let arg = u16::try_from(arg).ok()?;
    let signal = (arg & 0xff) as u8;
    // 0 only asks whether the job is there, as in kill(2); 64 is SIGRTMAX.
    if signal > 64 {
        return None;
    }
    Some((signal, KillScope::from_number((arg >> 8) as u8)?))
}

/// Size of a terminal window, in characters and in pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// Rows of characters.
    pub rows: u16,
    /// Columns of characters.
    pub columns: u16,
    /// Width in pixels, 0 if not known.
    pub width_pixels: u16,
    /// Height in pixels, 0 if not known.
    pub height_pixels: u16,
}

impl WindowSize {
    /// Packs the size into the argument of [`Kind::Attach`] and [`Kind::Resize`].
    pub fn to_arg(self) -> i64 {
        (u64::from(self.rows)
            | u64::from(self.columns) << 16
            | u64::from(self.width_pixels) << 32
            | u64::from(self.height_pixels) << 48) as i64
    }

    /// Unpacks what [`WindowSize::to_arg`] packed.
    pub fn from_arg(arg: i64) -> WindowSize {
        let bits = arg as u64;
        WindowSize {
            rows: bits as u16,
            columns: (bits >> 16) as u16,
            width_pixels: (bits >> 32) as u16,
            height_pixels: (bits >> 48) as u16,
        }
    }
}

/// The header of a message. The kind stays a number here, so that unknown ones can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The protocol version of the sender.
    pub version: u16,
    /// See [`Kind`].
    pub kind: u16,
    /// Depends on the kind.
    pub arg: i64,
    /// Bytes that follow the header.
    pub payload_bytes: u32,
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// Fewer bytes than a header has.
    Short {
        /// How many there were.
        bytes: usize,
    },
    /// Not [`MAGIC`]: the peer speaks something else.
    Magic {
        /// What stood there.
        found: u32,
    },
    /// A version other than [`VERSION`].
    Version {
        /// What stood there.
        found: u16,
    },
    /// The length in the header does not match the packet, or is above [`MAX_PAYLOAD_BYTES`].
    Length {
        /// What the header says.
        claimed: u32,
        /// What followed the header.
        actual: usize,
    },
    /// The reserved bytes are not zero.
    Reserved,
}

impl core::fmt::Display for HeaderError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            HeaderError::Short { bytes } => {
                write!(f, "a message of {bytes} bytes is shorter than its header of {HEADER_BYTES}")
            }
            HeaderError::Magic { found } => {
                write!(f, "not a message of ckpt: it starts with {found:#010x} instead of {MAGIC:#010x}")
            }
            HeaderError::Version { found } => {
                write!(f, "protocol version {found} is not understood, only version {VERSION}")
            }
            HeaderError::Length { claimed, actual } => {
                write!(
                    f,
                    "the header announces {claimed} bytes and {actual} follow (at most {MAX_PAYLOAD_BYTES})"
                )
            }
            HeaderError::Reserved => write!(f, "reserved bytes of the header are not zero"),
        }
    }
}

impl core::error::Error for HeaderError {}

impl Header {
    /// A header of this build's version. `payload_bytes` above [`MAX_PAYLOAD_BYTES`] is refused by the receiver.
    pub fn new(kind: Kind, arg: i64, payload_bytes: u32) -> Header {
        Header { version: VERSION, kind: kind as u16, arg, payload_bytes }
    }

    /// The bytes of the header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.arg.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes
    }

    /// Splits a packet into its header and its payload.
    ///
    /// # Errors
    /// Whatever makes the packet no message of this version.
    pub fn decode(packet: &[u8]) -> Result<(Header, &[u8]), HeaderError> {
        let Some((head, payload)) = packet.split_first_chunk::<HEADER_BYTES>() else {
            return Err(HeaderError::Short { bytes: packet.len() });
        };
        let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if u32_at(0) != MAGIC {
            return Err(HeaderError::Magic { found: u32_at(0) });
        }
        if u16_at(4) != VERSION {
            return Err(HeaderError::Version { found: u16_at(4) });
        }
        let mut arg = [0; 8];
        arg.copy_from_slice(&head[8..16]);
        let claimed = u32_at(16);
        if claimed as usize != payload.len() || payload.len() > MAX_PAYLOAD_BYTES {
            return Err(HeaderError::Length { claimed, actual: payload.len() });
        }
        if u32_at(20) != 0 {
            return Err(HeaderError::Reserved);
        }
        let header = Header {
            version: VERSION,
            kind: u16_at(6),
            arg: i64::from_le_bytes(arg),
            payload_bytes: claimed,
        };
        Ok((header, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_encoding() {
        for kind in Kind::ALL {
            for arg in [0, 1, -1, i64::MIN, i64::MAX] {
                let header = Header::new(kind, arg, 3);
                let mut packet = [0u8; HEADER_BYTES + 3];
                packet[..HEADER_BYTES].copy_from_slice(&header.encode());
                packet[HEADER_BYTES..].copy_from_slice(b"abc");
                let (decoded, payload) = Header::decode(&packet).unwrap();
                assert_eq!(decoded, header);
                assert_eq!(Kind::from_number(decoded.kind), Some(kind));
                assert_eq!(payload, b"abc");
            }
        }
    }

    #[test]
    fn layout_is_fixed() {
        let bytes = Header::new(Kind::Kill, 0x0102_0304, 5).encode();
        assert_eq!(
            bytes,
            [b'C', b'K', b'P', b'I', 1, 0, 2, 0, 4, 3, 2, 1, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        let good = Header::new(Kind::Status, 0, 0).encode();
        assert!(Header::decode(&good).is_ok());
        assert_eq!(Header::decode(&good[..10]), Err(HeaderError::Short { bytes: 10 }));
        let broken = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            bytes
        };
        assert!(matches!(Header::decode(&broken(0, b'X')), Err(HeaderError::Magic { .. })));
        assert_eq!(Header::decode(&broken(4, 9)), Err(HeaderError::Version { found: 9 }));
        assert_eq!(Header::decode(&broken(16, 7)), Err(HeaderError::Length { claimed: 7, actual: 0 }));
        assert_eq!(Header::decode(&broken(23, 1)), Err(HeaderError::Reserved));
        // An unknown kind is a message all the same, so that it can be answered.
        let (header, _) = Header::decode(&broken(7, 0x7f)).unwrap();
        assert_eq!(Kind::from_number(header.kind), None);
    }

    #[test]
    fn kinds_have_different_numbers() {
        for (at, kind) in Kind::ALL.iter().enumerate() {
            assert_eq!(Kind::ALL.iter().position(|other| *other as u16 == *kind as u16), Some(at));
        }
    }

    #[test]
    fn arguments_survive_packing() {
        for scope in [KillScope::Job, KillScope::Main, KillScope::Everything] {
            assert_eq!(parse_kill_arg(kill_arg(15, scope)), Some((15, scope)));
        }
        assert_eq!(parse_kill_arg(65), None);
        assert_eq!(parse_kill_arg(-1), None);
        assert_eq!(parse_kill_arg(0x0900), None);
        let size = WindowSize { rows: 24, columns: 80, width_pixels: 0xffff, height_pixels: 0x8001 };
        assert_eq!(WindowSize::from_arg(size.to_arg()), size);
    }
}
