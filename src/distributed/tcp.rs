//! Sockets of the standard library: every process has a connection to process 0, which adds up and sends the sums back.
//!
//! It needs nothing installed, and is meant for a few machines: process 0 receives and sends as many bytes for each of the
//! others as there are numbers. GPUs use it to meet and to agree, and exchange gradients through NCCL. Nothing is encrypted and
//! nobody has to prove who they are: use it inside a cluster.
//!
//! A message is a kind (one byte), a length in bytes (eight) and the numbers, all little-endian.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::AddAssign;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytemuck::Pod;
use socket2::{SockRef, TcpKeepalive};

use crate::distributed::launcher::Meeting;
use crate::distributed::rendezvous;
use crate::ops::Communicator;
use crate::{Error, Result};

/// Bytes that are added up at a time.
const CHUNK: usize = 1 << 20;
const HEADER: usize = 9;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Sum32 = 1,
    Sum64 = 2,
    Broadcast = 3,
    /// Process `length` is gone.
    Gone = 4,
}

/// This process' connections.
#[derive(Debug)]
pub(super) struct Tcp {
    rank: usize,
    size: usize,
    links: Mutex<Links>,
}

#[derive(Debug)]
struct Links {
    /// On process 0 those to 1, 2, …; on another the one to process 0.
    streams: Vec<TcpStream>,
    scratch: Vec<u8>,
}

impl Tcp {
    /// Waits until all processes have met, `patience` at most.
    pub fn meet(meeting: &Meeting, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let streams = match meeting.rank {
            0 => rendezvous::receive(meeting, patience)?,
            _ => vec![rendezvous::reach(meeting, deadline)?],
        };
        streams.iter().try_for_each(keep_alive)?;
        let links = Mutex::new(Links { streams, scratch: Vec::new() });
        Ok(Self { rank: meeting.rank, size: meeting.size, links })
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sum_of<T: Pod + AddAssign>(&self, kind: Kind, values: &mut [T]) -> Result<()> {
        let Links { streams, scratch } = &mut *self.links();
        if self.rank > 0 {
            let Some(stream) = streams.first_mut() else { return Ok(()) };
            send(stream, kind, bytemuck::cast_slice(values), scratch).map_err(|error| gone(0, &error))?;
            return receive_into(stream, 0, kind, bytemuck::cast_slice_mut(values));
        }
        for index in 0..streams.len() {
            if let Err(error) = add((index + 1, &mut streams[index]), kind, values, scratch) {
                return Err(self.lost(streams, index, error));
            }
        }
        self.send_to_all(streams, kind, bytemuck::cast_slice(values), scratch, None)
    }

    /// Sends a message of process 0 to all others, or to all but one of them.
    fn send_to_all(
        &self,
        streams: &mut [TcpStream],
        kind: Kind,
        bytes: &[u8],
        scratch: &mut Vec<u8>,
        but: Option<usize>,
    ) -> Result<()> {
        for index in (0..streams.len()).filter(|index| Some(index + 1) != but) {
            if let Err(error) = send(&mut streams[index], kind, bytes, scratch) {
                let error = gone(index + 1, &error);
                return Err(self.lost(streams, index, error));
            }
        }
        Ok(())
    }

    /// Tells the others that one of them is gone.
    fn lost(&self, streams: &mut [TcpStream], index: usize, error: Error) -> Error {
        for (other, stream) in streams.iter_mut().enumerate() {
            if other != index {
                // Whoever cannot be told is gone too.
                let _ = stream.write_all(&header(Kind::Gone, index as u64 + 1));
            }
        }
        error
    }
}

impl Communicator for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        self.sum_of(Kind::Sum32, values)
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.sum_of(Kind::Sum64, values)
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        let Links { streams, scratch } = &mut *self.links();
        match streams.first_mut() {
            Some(stream) if self.rank > 0 && self.rank == root => {
                send(stream, Kind::Broadcast, bytes, scratch).map_err(|error| gone(0, &error))
            }
            Some(stream) if self.rank > 0 => receive_into(stream, 0, Kind::Broadcast, bytes),
            _ => {
                if let Some(index) = root.checked_sub(1)
                    && let Some(stream) = streams.get_mut(index)
                    && let Err(error) = receive_into(stream, root, Kind::Broadcast, bytes)
                {
                    return Err(self.lost(streams, index, error));
                }
                self.send_to_all(streams, Kind::Broadcast, bytes, scratch, Some(root))
            }
        }
    }

    fn barrier(&self) -> Result<()> {
        self.sum_f64(&mut [])
    }

    fn alive(&self) -> Result<()> {
        // In an exchange that is under way whoever is gone is noticed.
        let Ok(mut links) = self.links.try_lock() else { return Ok(()) };
        let streams = &mut links.streams;
        for index in 0..streams.len() {
            let rank = if self.rank == 0 { index + 1 } else { 0 };
            match announced(&streams[index]) {
                Ok(None) => {}
                Ok(Some(other)) => return Err(told(other)),
                Err(error) if self.rank == 0 => return Err(self.lost(streams, index, gone(rank, &error))),
                Err(error) => return Err(gone(rank, &error)),
            }
        }
        Ok(())
    }
}

/// Which process is gone, if that is what the next message says. An error where the connection is gone itself. It does not wait.
fn announced(stream: &TcpStream) -> io::Result<Option<u64>> {
    let mut next = [0; HEADER];
    stream.set_nonblocking(true)?;
    let seen = stream.peek(&mut next);
    stream.set_nonblocking(false)?;
    match seen {
        Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        Ok(HEADER) if next[0] == Kind::Gone as u8 => {
            Ok(Some(u64::from_le_bytes(next[1..].try_into().unwrap_or_default())))
        }
        Ok(_) => Ok(None),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

fn told(rank: u64) -> Error {
    Error::Distributed(format!("process {rank} is gone, says process 0"))
}

/// Asks the system to notice that the machine at the other end is gone, which nothing else would tell: within three minutes.
fn keep_alive(stream: &TcpStream) -> Result<()> {
    let socket = SockRef::from(stream);
    let asking = TcpKeepalive::new().with_time(Duration::from_secs(20)).with_interval(Duration::from_secs(5));
    #[cfg(target_os = "linux")]
    let asking = asking.with_retries(4);
    let asked = socket.set_tcp_keepalive(&asking);
    // What was sent and is not acknowledged counts too, or not read: a process may stand still for a while.
    #[cfg(target_os = "linux")]
    let asked = asked.and_then(|()| socket.set_tcp_user_timeout(Some(Duration::from_secs(180))));
    asked.map_err(|error| Error::Distributed(format!("a connection between processes cannot be watched: {error}")))
}

fn gone(rank: usize, error: &io::Error) -> Error {
    Error::Distributed(format!("process {rank} is gone ({error})"))
}

fn out_of_step() -> Error {
    Error::Distributed("the processes do not do the same; start all of them with the same program and arguments".into())
}

fn header(kind: Kind, length: u64) -> [u8; HEADER] {
    let mut header = [kind as u8; HEADER];
    header[1..].copy_from_slice(&length.to_le_bytes());
    header
}

/// Sends a message; a short one at once with its header.
fn send(stream: &mut TcpStream, kind: Kind, bytes: &[u8], scratch: &mut Vec<u8>) -> io::Result<()> {
    scratch.clear();
    scratch.extend_from_slice(&header(kind, bytes.len() as u64));
    let (first, rest) = bytes.split_at(bytes.len().min(CHUNK));
    scratch.extend_from_slice(first);
    stream.write_all(scratch)?;
    stream.write_all(rest)
}

/// Reads a header and checks that it is the one to come.
fn expect(stream: &mut TcpStream, rank: usize, kind: Kind, length: usize) -> Result<()> {
    let mut found = [0; HEADER];
    stream.read_exact(&mut found).map_err(|error| gone(rank, &error))?;
    if found == header(kind, length as u64) {
        return Ok(());
    }
    if found[0] == Kind::Gone as u8 {
        let rank = u64::from_le_bytes(found[1..].try_into().unwrap_or_default());
        return Err(told(rank));
    }
    Err(out_of_step())
}

/// A message of process `rank`.
fn receive_into(stream: &mut TcpStream, rank: usize, kind: Kind, bytes: &mut [u8]) -> Result<()> {
    expect(stream, rank, kind, bytes.len())?;
    stream.read_exact(bytes).map_err(|error| gone(rank, &error))
}

/// Adds a message of another process to `values`.
fn add<T: Pod + AddAssign>(
    (rank, stream): (usize, &mut TcpStream),
    kind: Kind,
    values: &mut [T],
    scratch: &mut Vec<u8>,
) -> Result<()> {
    expect(stream, rank, kind, size_of_val(values))?;
    for part in values.chunks_mut(CHUNK / size_of::<T>()) {
        scratch.resize(size_of_val(part), 0);
        stream.read_exact(scratch).map_err(|error| gone(rank, &error))?;
        for (value, bytes) in part.iter_mut().zip(scratch.chunks_exact(size_of::<T>())) {
            *value += bytemuck::pod_read_unaligned(bytes);
        }
    }
    Ok(())
}
