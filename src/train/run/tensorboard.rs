//! TensorBoard's event files: records of a length, its checksum, an `Event` message in protocol buffers and its checksum, as
//! TensorFlow's `record_writer.h`, `event.proto` and `summary.proto` have them.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// Writes one event file. Every record is handed to the operating system at once, so that a curve can be watched.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a file of its own in `folder`, which is made where it is missing; TensorBoard reads all of a folder as one run. What others there say of the
    /// steps after `done`, which are done again, is taken back.
    pub fn create(folder: &Path, done: u64) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Sorted by time; the process number keeps runs apart that start in the same second.
        let name = format!("events.out.tfevents.{:010}.{}.vitmae", now.as_secs(), std::process::id());
        let path = folder.join(name);
        fs::create_dir_all(folder).map_err(|error| Error::io("creating", folder, error))?;
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let mut events = Self { file: file.map_err(|error| Error::io("creating", &path, error))?, path };
        let mut version = Message::default();
        version.bytes(3, b"brain.Event:2");
        events.write(0, &version)?;
        if done > 0 {
            // SessionLog with status START.
            let (mut start, mut log) = (Message::default(), Message::default());
            log.varint(1, 1);
            start.bytes(7, &log.0);
            events.write(done + 1, &start)?;
        }
        Ok(events)
    }

    /// Numbers of a step, each with its tag.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, number) in values {
            let mut value = Message::default();
            value.bytes(1, tag.as_bytes());
            value.float(2, *number as f32);
            summary.bytes(1, &value.0);
        }
        self.summary(step, &summary)
    }

    /// An RGB picture as PNG.
    pub fn picture(&mut self, step: u64, tag: &str, png: &[u8]) -> Result<()> {
        // The first chunk of a PNG file begins with its sizes.
        let size = |at: usize| {
            let bytes = png.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            u64::from(bytes.map_or(0, u32::from_be_bytes))
        };
        let (width, height) = (size(16), size(20));
        let (mut picture, mut value, mut summary) = (Message::default(), Message::default(), Message::default());
        picture.varint(1, height);
        picture.varint(2, width);
        picture.varint(3, 3);
        picture.bytes(4, png);
        value.bytes(1, tag.as_bytes());
        value.bytes(4, &picture.0);
        summary.bytes(1, &value.0);
        self.summary(step, &summary)
    }

    fn summary(&mut self, step: u64, summary: &Message) -> Result<()> {
        let mut event = Message::default();
        event.bytes(5, &summary.0);
        self.write(step, &event)
    }

    /// Writes a record: an event with time and step before what `rest` holds.
    fn write(&mut self, step: u64, rest: &Message) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = Message::default();
        event.double(1, now.as_secs_f64());
        event.varint(2, step);
        event.0.extend_from_slice(&rest.0);
        let length = (event.0.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.0.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_checksum(&length).to_le_bytes());
        record.extend_from_slice(&event.0);
        record.extend_from_slice(&masked_checksum(&event.0).to_le_bytes());
        self.file.write_all(&record).map_err(|error| Error::io("writing", &self.path, error))
    }
}

/// CRC-32C, turned and moved, as these files have it.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protocol buffer as it is put together.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.number(field << 3);
        self.number(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.number(field << 3 | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.number(field << 3 | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.number(field << 3 | 2);
        self.number(value.len() as u64);
        self.0.extend_from_slice(value);
    }
}
