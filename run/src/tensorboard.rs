//! Event files for TensorBoard: TFRecords of the Event protobuf, as far as scalars and pictures need them.
//!
//! Formats: `tensorflow/core/lib/io/record_writer.h`, `tensorflow/core/util/event.proto`,
//! `tensorflow/core/framework/summary.proto`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{IoContext, Result};

/// Added to a rotated checksum, so that the checksum of data which holds checksums stays useful.
const CRC_MASK_DELTA: u32 = 0xa282_ead8;
const FILE_VERSION: &str = "brain.Event:2";

/// Protobuf field numbers and constants.
mod field {
    pub const EVENT_WALL_TIME: u32 = 1;
    pub const EVENT_STEP: u32 = 2;
    pub const EVENT_FILE_VERSION: u32 = 3;
    pub const EVENT_SUMMARY: u32 = 5;
    pub const EVENT_SESSION_LOG: u32 = 7;
    pub const SUMMARY_VALUE: u32 = 1;
    pub const VALUE_TAG: u32 = 1;
    pub const VALUE_SIMPLE_VALUE: u32 = 2;
    pub const VALUE_IMAGE: u32 = 4;
    pub const IMAGE_HEIGHT: u32 = 1;
    pub const IMAGE_WIDTH: u32 = 2;
    pub const IMAGE_COLORSPACE: u32 = 3;
    pub const IMAGE_ENCODED: u32 = 4;
    pub const SESSION_LOG_STATUS: u32 = 1;

    pub const COLORSPACE_RGB: u64 = 3;
    pub const SESSION_START: u64 = 1;
}

/// Writes one event file. Each record goes to the system at once, so that TensorBoard sees it.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in `folder`, named by the time so that files sort in order of writing.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let now = since_epoch();
        let name = format!("events.out.tfevents.{:010}.{:09}", now.as_secs(), now.subsec_nanos());
        let path = folder.as_ref().join(name);
        let file = File::create_new(&path).context("create", &path)?;
        let mut writer = Self { path, file };
        let mut event = event(now.as_secs_f64(), 0);
        put_bytes(&mut event, field::EVENT_FILE_VERSION, FILE_VERSION.as_bytes());
        writer.write(&event)?;
        Ok(writer)
    }

    /// Tells TensorBoard to forget what earlier files say about `step` and later ones.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn restart_at(&mut self, step: u64) -> Result<()> {
        let mut log = Vec::new();
        put_varint_field(&mut log, field::SESSION_LOG_STATUS, field::SESSION_START);
        let mut event = event(since_epoch().as_secs_f64(), step);
        put_bytes(&mut event, field::EVENT_SESSION_LOG, &log);
        self.write(&event)
    }

    /// Writes values of one step, each under its tag.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        self.write(&scalars_event(since_epoch().as_secs_f64(), step, values))
    }

    /// Writes a PNG of `width` x `height` pixels.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn picture(&mut self, step: u64, tag: &str, png: &[u8], width: u32, height: u32) -> Result<()> {
        let mut image = Vec::with_capacity(png.len() + 32);
        put_varint_field(&mut image, field::IMAGE_HEIGHT, height.into());
        put_varint_field(&mut image, field::IMAGE_WIDTH, width.into());
        put_varint_field(&mut image, field::IMAGE_COLORSPACE, field::COLORSPACE_RGB);
        put_bytes(&mut image, field::IMAGE_ENCODED, png);
        let mut value = Vec::with_capacity(image.len() + tag.len() + 16);
        put_bytes(&mut value, field::VALUE_TAG, tag.as_bytes());
        put_bytes(&mut value, field::VALUE_IMAGE, &image);
        let mut summary = Vec::with_capacity(value.len() + 16);
        put_bytes(&mut summary, field::SUMMARY_VALUE, &value);
        let mut event = event(since_epoch().as_secs_f64(), step);
        put_bytes(&mut event, field::EVENT_SUMMARY, &summary);
        self.write(&event)
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&record(event)).context("write", &self.path)
    }
}

/// Removes all event files in `folder`.
pub(crate) fn clear(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).context("read folder", folder)? {
        let path = entry.context("read folder", folder)?.path();
        fs::remove_file(&path).context("remove", &path)?;
    }
    Ok(())
}

fn since_epoch() -> Duration {
    // A clock before 1970 only makes the time axis wrong.
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    put_key(&mut event, field::EVENT_WALL_TIME, WireType::Fixed64);
    event.extend(wall_time.to_le_bytes());
    put_varint_field(&mut event, field::EVENT_STEP, step);
    event
}

fn scalars_event(wall_time: f64, step: u64, values: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, scalar) in values {
        let mut value = Vec::new();
        put_bytes(&mut value, field::VALUE_TAG, tag.as_bytes());
        put_key(&mut value, field::VALUE_SIMPLE_VALUE, WireType::Fixed32);
        value.extend((*scalar as f32).to_le_bytes());
        put_bytes(&mut summary, field::SUMMARY_VALUE, &value);
    }
    let mut event = event(wall_time, step);
    put_bytes(&mut event, field::EVENT_SUMMARY, &summary);
    event
}

/// One TFRecord: length, checksum of the length, data, checksum of the data, all little-endian.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(CRC_MASK_DELTA)
}

#[derive(Clone, Copy)]
enum WireType {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn put_key(out: &mut Vec<u8>, field: u32, wire_type: WireType) {
    put_varint(out, u64::from(field << 3 | wire_type as u32));
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint_field(out: &mut Vec<u8>, field: u32, value: u64) {
    put_key(out, field, WireType::Varint);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    put_key(out, field, WireType::Bytes);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A decoded protobuf field: its number and its payload, as bytes.
    type Field = (u64, Vec<u8>);

    fn take_varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = take(bytes, 1)[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
        let (head, tail) = bytes.split_at(n);
        *bytes = tail;
        head
    }

    fn decode(mut bytes: &[u8]) -> Vec<Field> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = take_varint(&mut bytes);
            let payload = match key & 7 {
                0 => take_varint(&mut bytes).to_le_bytes().to_vec(),
                1 => take(&mut bytes, 8).to_vec(),
                2 => {
                    let length = take_varint(&mut bytes) as usize;
                    take(&mut bytes, length).to_vec()
                }
                5 => take(&mut bytes, 4).to_vec(),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, payload));
        }
        fields
    }

    fn read_records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = take(&mut rest, 8);
            assert_eq!(take(&mut rest, 4), masked_crc(length).to_le_bytes());
            let data = take(&mut rest, u64::from_le_bytes(length.try_into().unwrap()) as usize);
            assert_eq!(take(&mut rest, 4), masked_crc(data).to_le_bytes());
            records.push(data.to_vec());
        }
        records
    }

    fn get(fields: &[Field], number: u32) -> &[u8] {
        &fields.iter().find(|(n, _)| *n == u64::from(number)).expect("field is there").1
    }

    #[test]
    fn what_is_written_decodes_to_what_was_given() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        writer.restart_at(300).unwrap();
        writer.scalars(300, &[("loss/text", 2.5), ("lr", 1e-3)]).unwrap();
        writer.picture(301, "samples", &[1; 200], 64, 32).unwrap();
        let events: Vec<_> = read_records(&writer.path).iter().map(|record| decode(record)).collect();
        assert_eq!(events.len(), 4);
        assert_eq!(get(&events[0], field::EVENT_FILE_VERSION), FILE_VERSION.as_bytes());
        let seconds = f64::from_le_bytes(get(&events[0], field::EVENT_WALL_TIME).try_into().unwrap());
        assert!((since_epoch().as_secs_f64() - seconds).abs() < 60.0);
        assert_eq!(get(&events[1], field::EVENT_STEP), 300_u64.to_le_bytes());
        assert_eq!(get(&events[1], field::EVENT_SESSION_LOG), [8, 1]);
        let values: Vec<_> = decode(get(&events[2], field::EVENT_SUMMARY))
            .iter()
            .map(|(_, value)| {
                let value = decode(value);
                let scalar = f32::from_le_bytes(get(&value, field::VALUE_SIMPLE_VALUE).try_into().unwrap());
                (String::from_utf8(get(&value, field::VALUE_TAG).to_vec()).unwrap(), scalar)
            })
            .collect();
        assert_eq!(values, [("loss/text".to_owned(), 2.5), ("lr".to_owned(), 1e-3)]);
        let value = decode(get(&decode(get(&events[3], field::EVENT_SUMMARY)), field::SUMMARY_VALUE));
        let image = decode(get(&value, field::VALUE_IMAGE));
        assert_eq!(get(&image, field::IMAGE_WIDTH), 64_u64.to_le_bytes());
        assert_eq!(get(&image, field::IMAGE_HEIGHT), 32_u64.to_le_bytes());
        assert_eq!(get(&image, field::IMAGE_ENCODED), [1; 200]);
    }

    #[test]
    fn golden_bytes() {
        let event = scalars_event(1.0, 300, &[("a", 0.5)]);
        let expected = [
            0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, // wall_time
            0x10, 0xac, 0x02, // step
            0x2a, 0x0a, // summary
            0x0a, 0x08, // value
            0x0a, 0x01, b'a', // tag
            0x15, 0, 0, 0, 0x3f, // simple_value
        ];
        assert_eq!(event, expected);
        // The CRC-32C test vector of RFC 3720 B.4, masked.
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
        assert_eq!(record(&event)[..8], [24, 0, 0, 0, 0, 0, 0, 0]);
    }
}
