// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages of [`ckpt_abi::init_protocol`] over a packet socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ckpt_abi::init_protocol::{HEADER_BYTES, Header, HeaderError, Kind, MAX_PAYLOAD_BYTES};
use ckpt_sys::local_socket;

/// Room for the largest message.
pub(crate) const BUFFER_BYTES: usize = HEADER_BYTES + MAX_PAYLOAD_BYTES;

/// A message received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// `None` for a kind this build does not know.
    pub kind: Option<Kind>,
    pub kind_number: u16,
    pub arg: i64,
    pub payload: Vec<u8>,
}

impl Message {
    /// The payload as text for a person, cleaned of control characters that could play tricks on a terminal.
    pub fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.payload);
        text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
    }
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// The packet of a message. Texts that are too long are cut.
pub(crate) fn packet(kind: Kind, arg: i64, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(MAX_PAYLOAD_BYTES)];
    let mut packet = Header::new(kind, arg, payload.len() as u32).encode().to_vec();
    packet.extend_from_slice(payload);
    packet
}

/// Sends a message, waiting while the queue is full.
pub(crate) fn send(socket: impl AsFd, kind: Kind, arg: i64, payload: &[u8]) -> io::Result<()> {
    local_socket::send_packet(socket.as_fd(), &packet(kind, arg, payload), true)
}

/// Receives a message; `None` at the end of the connection.
pub(crate) fn receive(socket: BorrowedFd<'_>, wait: bool) -> Result<Option<Message>, ReceiveError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let length = local_socket::receive_packet(socket, &mut buffer, wait)?;
    decode(&buffer[..length])
}

/// As [`receive`], with the descriptors that come with the message.
pub(crate) fn receive_with(
    socket: BorrowedFd<'_>,
    wait: bool,
) -> Result<Option<(Message, Vec<OwnedFd>)>, ReceiveError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let (length, descriptors) = local_socket::receive_packet_with(socket, &mut buffer, wait)?;
    Ok(decode(&buffer[..length])?.map(|message| (message, descriptors)))
}

fn decode(packet: &[u8]) -> Result<Option<Message>, ReceiveError> {
    if packet.is_empty() {
        return Ok(None);
    }
    let (header, payload) = Header::decode(packet)?;
    Ok(Some(Message {
        kind: Kind::from_number(header.kind),
        kind_number: header.kind,
        arg: header.arg,
        payload: payload.to_vec(),
    }))
}
