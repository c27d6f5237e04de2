//! How processes find each other: all but process 0 connect to it and say who they are; it answers when everybody is there.
//!
//! A greeting is a word (eight bytes), rank and size (four each) and a number that stands for the run (eight), little-endian. The
//! answer is the same word, or another one and why not (one byte), at once.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::distributed::launcher::Meeting;
use crate::{Error, Result};

/// Sent first by everybody, so that a stray connection is told from a process of the run.
const GREETING: &[u8; 8] = b"vitmae-2";
/// The answer to a process that does not belong to the run.
const REFUSAL: &[u8; 8] = b"vitmae-!";
/// Why: the processes are not as many.
const OTHER_SIZE: u8 = 1;
/// Why: it is another run.
const OTHER_RUN: u8 = 2;
/// How long a stranger may take to greet.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// How often process 0 looks for what has come.
const NAP: Duration = Duration::from_millis(10);
const LENGTH: usize = 24;

fn greeting(meeting: &Meeting) -> [u8; LENGTH] {
    let mut greeting = [0; LENGTH];
    greeting[..8].copy_from_slice(GREETING);
    // A launch has at most 2^16 processes.
    greeting[8..12].copy_from_slice(&(meeting.rank as u32).to_le_bytes());
    greeting[12..16].copy_from_slice(&(meeting.size as u32).to_le_bytes());
    greeting[16..].copy_from_slice(&u64::from(crc32c::crc32c(meeting.run.as_bytes())).to_le_bytes());
    greeting
}

/// A connection that has not said yet who it is.
struct Stranger {
    stream: TcpStream,
    from: SocketAddr,
    until: Instant,
    said: [u8; LENGTH],
    length: usize,
}

/// What became of a stranger.
enum Heard {
    /// Nothing yet.
    NotAll,
    /// The process of this rank.
    Process(usize),
    /// Somebody else, and why.
    Nobody(String),
}

impl Stranger {
    /// Reads what has come of its greeting; it does not wait.
    fn listen(&mut self, meeting: &Meeting) -> Heard {
        let expected = greeting(meeting);
        loop {
            if self.said[..self.length.min(8)] != expected[..self.length.min(8)] {
                return Heard::Nobody("it does not know the greeting".into());
            }
            if self.length == LENGTH {
                break;
            }
            match self.stream.read(&mut self.said[self.length..]) {
                Ok(0) => return Heard::Nobody("it hung up".into()),
                Ok(read) => self.length += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Heard::Nobody(error.to_string()),
                Err(_) if Instant::now() < self.until => return Heard::NotAll,
                Err(_) => return Heard::Nobody("it says nothing".into()),
            }
        }
        let word = |at: usize| self.said[at..at + 4].iter().rev().fold(0, |word, &byte| word << 8 | usize::from(byte));
        let (rank, size) = (word(8), word(12));
        let (why, problem) = if self.said[16..] != expected[16..] {
            (OTHER_RUN, "it belongs to another run".to_owned())
        } else if size != meeting.size {
            (OTHER_SIZE, format!("it belongs to a run of {size} processes, and this one has {}", meeting.size))
        } else {
            return Heard::Process(rank);
        };
        let mut answer = REFUSAL.to_vec();
        answer.push(why);
        // Whoever does not hear it asks again.
        let _ = self.stream.write_all(&answer);
        Heard::Nobody(problem)
    }
}

/// Process 0: takes a connection from each of the others.
pub(super) fn receive(meeting: &Meeting, patience: Duration) -> Result<Vec<TcpStream>> {
    let Meeting { address, port, size, .. } = meeting;
    let failed = |problem: String| Error::Distributed(format!("process 0 at {address}:{port}: {problem}"));
    let listener = listen(address, *port)
        .map_err(|error| failed(format!("it cannot listen there: {error}; choose another MASTER_PORT")))?;
    let deadline = Instant::now() + patience;
    let mut streams: Vec<Option<TcpStream>> = (1..*size).map(|_| None).collect();
    let mut strangers: Vec<Stranger> = Vec::new();
    while streams.iter().any(Option::is_none) {
        match listener.accept() {
            Ok((stream, from)) => {
                stream.set_nonblocking(true).map_err(|error| failed(error.to_string()))?;
                let until = Instant::now() + GREETING_TIME;
                strangers.push(Stranger { stream, from, until, said: [0; LENGTH], length: 0 });
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                std::thread::sleep(NAP);
            }
            Err(error) => return Err(failed(error.to_string())),
        }
        for index in (0..strangers.len()).rev() {
            let heard = strangers[index].listen(meeting);
            if matches!(heard, Heard::NotAll) {
                continue;
            }
            let Stranger { stream, from, .. } = strangers.swap_remove(index);
            match heard {
                Heard::NotAll => {}
                Heard::Nobody(problem) => tracing::warn!("{from} is no process of this run: {problem}"),
                Heard::Process(rank) => match streams.get_mut(rank.wrapping_sub(1)) {
                    Some(place @ None) => {
                        let ready = stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true));
                        ready.map_err(|error| failed(error.to_string()))?;
                        *place = Some(stream);
                    }
                    _ => {
                        return Err(failed(format!("{from} says that it is process {rank}, and there is one already")));
                    }
                },
            }
        }
        if Instant::now() > deadline {
            let missing: Vec<String> =
                (1..*size).filter(|rank| streams[rank - 1].is_none()).map(|rank| rank.to_string()).collect();
            let seconds = patience.as_secs();
            let missing = missing.join(", ");
            return Err(failed(format!(
                "no word from process {missing} in {seconds} seconds; is it started, and can it reach this one?"
            )));
        }
    }
    let mut streams: Vec<TcpStream> = streams.into_iter().flatten().collect();
    for (index, stream) in streams.iter_mut().enumerate() {
        let answered = stream.write_all(GREETING);
        answered.map_err(|error| Error::Distributed(format!("process {} is gone ({error})", index + 1)))?;
    }
    Ok(streams)
}

/// Listens without waiting when asked for connections.
fn listen(address: &str, port: u16) -> io::Result<TcpListener> {
    let inside = address == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let listener = if inside {
        TcpListener::bind((address, port))
    } else {
        // At every interface: a machine often takes its own name for another address than the others do.
        TcpListener::bind(("::", port)).or_else(|error| match error.kind() {
            io::ErrorKind::AddrInUse => Err(error),
            _ => TcpListener::bind(("0.0.0.0", port)),
        })
    }?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Another process: connects to process 0.
pub(super) fn reach(meeting: &Meeting, deadline: Instant) -> Result<TcpStream> {
    let Meeting { rank, size, address, port, .. } = meeting;
    loop {
        let attempt = TcpStream::connect((address.as_str(), *port)).and_then(|mut stream| {
            stream.set_nodelay(true)?;
            stream.write_all(&greeting(meeting))?;
            // It answers when everybody is there.
            stream.set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()).max(GREETING_TIME)))?;
            let mut answer = [0; 8];
            stream.read_exact(&mut answer)?;
            let mut why = [0];
            if answer == *REFUSAL {
                stream.read_exact(&mut why)?;
            }
            stream.set_read_timeout(None)?;
            Ok((stream, answer, why[0]))
        });
        let problem = match attempt {
            Ok((stream, answer, _)) if answer == *GREETING => return Ok(stream),
            Ok((_, answer, why)) if answer == *REFUSAL => {
                let why = match why {
                    OTHER_SIZE => format!("its run does not have {size} processes; check WORLD_SIZE"),
                    _ => "it belongs to another run; choose another MASTER_PORT for one of them".into(),
                };
                return Err(Error::Distributed(format!(
                    "process {rank} is turned away by process 0 at {address}:{port}: {why}"
                )));
            }
            Ok(_) => "what answers there is no vitmae, or another version".into(),
            Err(error) => error.to_string(),
        };
        if Instant::now() > deadline {
            return Err(Error::Distributed(format!(
                "process {rank} cannot reach process 0 at {address}:{port}: {problem}; check MASTER_ADDR and MASTER_PORT"
            )));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
