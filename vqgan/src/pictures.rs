//! Between pictures in memory and tensors on a device.

use m6_data::Rgb8;
use m6_runtime::device::upload;
use tch::{Device, Kind, Tensor};

use crate::config::COLOURS;
use crate::error::{Result, VqganError};

/// Half of the range of a byte: bytes 0 to 255 are values -1 to 1.
const HALF_RANGE: f64 = 127.5;

/// Pictures of one size as bytes `[b, 3, h, w]` on the CPU.
///
/// # Errors
/// When there is no picture or their sizes differ.
pub fn pictures_to_tensor(pictures: &[Rgb8]) -> Result<Tensor> {
    let first = pictures.first().ok_or_else(|| VqganError::Pictures("none, expected at least one".into()))?;
    let (width, height) = (first.width, first.height);
    let mut bytes = Vec::with_capacity(pictures.len() * first.pixels.len());
    for picture in pictures {
        if (picture.width, picture.height) != (width, height) {
            let (w, h) = (picture.width, picture.height);
            return Err(VqganError::Pictures(format!("one of {w}x{h} among others of {width}x{height}")));
        }
        bytes.extend_from_slice(&picture.pixels);
    }
    let shape = [pictures.len() as i64, i64::from(height), i64::from(width), COLOURS];
    let rows =
        Tensor::f_from_data_size(&bytes, &shape, Kind::Uint8).map_err(m6_runtime::RuntimeError::from)?;
    Ok(rows.permute([0, 3, 1, 2]))
}

/// Bytes `[b, 3, h, w]` as float32 values from -1 to 1 on `device`. The upload does not wait for the device.
///
/// # Errors
/// When there is no memory for them.
pub fn to_unit(bytes: &Tensor, device: Device) -> Result<Tensor> {
    // Pictures come with their colours innermost; the norms are fastest with whole planes.
    Ok((upload(bytes, device)?.to_kind(Kind::Float) / HALF_RANGE - 1.0).contiguous())
}

/// Values from -1 to 1 (others are clamped) rounded to bytes, on the same device.
pub fn to_bytes(x: &Tensor) -> Tensor {
    let scaled = (x.detach().to_kind(Kind::Float) + 1.0) * HALF_RANGE;
    scaled.round().clamp(0.0, 2.0 * HALF_RANGE).to_kind(Kind::Uint8)
}

/// Values from -1 to 1, `[b, 3, h, w]`, as pictures; one copy to the host.
#[must_use]
pub fn to_pictures(x: &Tensor) -> Vec<Rgb8> {
    bytes_to_pictures(&to_bytes(x))
}

/// Bytes `[b, 3, h, w]` as pictures.
pub(crate) fn bytes_to_pictures(bytes: &Tensor) -> Vec<Rgb8> {
    let rows = bytes.permute([0, 2, 3, 1]).contiguous().to_device(Device::Cpu);
    let (_, height, width, _) = match rows.size()[..] {
        [b, h, w, c] => (b, h, w, c),
        _ => unreachable!("pictures have four axes"),
    };
    let mut bytes = vec![0; rows.numel()];
    rows.copy_data_u8(&mut bytes, rows.numel());
    let size = (height * width * COLOURS) as usize;
    let picture =
        |pixels: &[u8]| Rgb8 { width: width as u32, height: height as u32, pixels: pixels.to_vec() };
    bytes.chunks_exact(size).map(picture).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32, start: u8) -> Rgb8 {
        let pixels = (0..width * height * 3).map(|i| start.wrapping_add(i as u8)).collect();
        Rgb8 { width, height, pixels }
    }

    #[test]
    fn pictures_come_back_byte_for_byte() {
        let pictures = [picture(5, 4, 0), picture(5, 4, 200)];
        let bytes = pictures_to_tensor(&pictures).unwrap();
        assert_eq!(bytes.size(), [2, 3, 4, 5]);
        // Row 1, column 2, blue: (1 * 5 + 2) * 3 + 2.
        assert_eq!(bytes.int64_value(&[0, 2, 1, 2]), 23);
        let x = to_unit(&bytes, Device::Cpu).unwrap();
        assert!(x.is_contiguous());
        assert!(x.min().double_value(&[]) >= -1.0 && x.max().double_value(&[]) <= 1.0);
        assert_eq!(to_pictures(&x), pictures);
    }

    #[test]
    fn values_outside_are_clamped() {
        let x = Tensor::from_slice(&[-1.5f32, 1.5]).view([1, 1, 1, 2]);
        assert_eq!(to_bytes(&x), Tensor::from_slice(&[0u8, 255]).view([1, 1, 1, 2]));
    }

    #[test]
    fn sizes_must_agree() {
        let message = pictures_to_tensor(&[picture(4, 4, 0), picture(5, 4, 0)]).unwrap_err().to_string();
        assert_eq!(message, "pictures: one of 5x4 among others of 4x4");
        assert!(pictures_to_tensor(&[]).is_err());
    }
}
