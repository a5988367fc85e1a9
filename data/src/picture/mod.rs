//! RGB pictures: decoding, encoding and the few operations that training and grids need.

mod decoded;
mod jpeg;
#[cfg(feature = "turbojpeg")]
mod planes;
mod rgb;

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};

pub(crate) use decoded::Decoded;
pub use decoded::MAX_PIXELS;
use decoded::{check_size, upright_on_white};
pub(crate) use rgb::Part;
pub use rgb::{Rgb8, grid};

use crate::error::{DataError, Result};

const FORMATS: [ImageFormat; 4] = [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp];

impl Rgb8 {
    /// Decodes JPEG, PNG, WebP or BMP: upright as its EXIF orientation says, grey, CMYK and 16 bit converted to 8-bit
    /// RGB, transparency put on white.
    ///
    /// # Errors
    /// Another format, broken bytes, or more than [`MAX_PIXELS`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Decoded::for_side(bytes, None)?.into_rgb()
    }
}

impl Decoded {
    /// As [`Rgb8::decode`]; but of a JPEG whose short side will be scaled to `short_side` no more may be decoded than that
    /// needs: a half, a quarter or an eighth of its size, never smaller than `short_side`, or planes. Only with the
    /// feature `turbojpeg`; without it every picture has its full size.
    ///
    /// # Errors
    /// As for [`Rgb8::decode`].
    pub(crate) fn for_side(bytes: &[u8], short_side: Option<u32>) -> Result<Self> {
        let broken = |e: image::ImageError| DataError::Picture(e.to_string());
        let format = image::guess_format(bytes).ok().filter(|format| FORMATS.contains(format));
        let format =
            format.ok_or_else(|| DataError::Picture("expected JPEG, PNG, WebP or BMP".to_owned()))?;
        if format == ImageFormat::Jpeg {
            return jpeg::decode(bytes, short_side);
        }
        if format == ImageFormat::WebP {
            check_chunks(bytes)?;
        }
        let mut decoder =
            ImageReader::with_format(Cursor::new(bytes), format).into_decoder().map_err(broken)?;
        check_size(decoder.dimensions())?;
        let orientation = decoder.orientation().map_err(broken)?;
        let picture = DynamicImage::from_decoder(decoder).map_err(broken)?;
        Ok(Self::Rgb(upright_on_white(picture, orientation)))
    }
}

/// The decoder takes memory for what a WebP file says of its chunks before it reads them: up to 4 GB for some bytes.
fn check_chunks(webp: &[u8]) -> Result<()> {
    /// Name and size of the file, and its kind.
    const HEAD: usize = 12;
    /// Name and size of a chunk.
    const CHUNK_HEAD: usize = 8;
    let size_at = |at: usize| {
        let bytes = webp.get(at..at + size_of::<u32>()).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| u32::from_le_bytes(bytes) as usize)
    };
    let end = size_at(4).map_or(0, |size| size + CHUNK_HEAD).min(webp.len());
    let mut at = HEAD;
    while at < end {
        let Some(size) = size_at(at + 4) else { break };
        if size > webp.len() - at - CHUNK_HEAD {
            return Err(DataError::Picture(format!("a chunk at byte {at} ends behind the file")));
        }
        // Of even length, but for the last.
        at += CHUNK_HEAD + size.next_multiple_of(2);
    }
    Ok(())
}

/// What is measured of an encoded picture.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Columns, upright.
    pub width: u32,
    /// Rows, upright.
    pub height: u32,
    /// Size of the encoding.
    pub bytes: usize,
    /// BLAKE3 of the encoding.
    pub digest: [u8; blake3::OUT_LEN],
    /// By [`Rgb8::difference_hash`].
    pub hash: u64,
}

impl Measured {
    /// Decodes and measures.
    ///
    /// # Errors
    /// As for [`Rgb8::decode`].
    pub(crate) fn of(encoded: &[u8]) -> Result<Self> {
        let decoded = Rgb8::decode(encoded)?;
        Ok(Self {
            width: decoded.width,
            height: decoded.height,
            bytes: encoded.len(),
            digest: *blake3::hash(encoded).as_bytes(),
            hash: decoded.difference_hash()?,
        })
    }

    /// Width divided by height.
    pub(crate) fn aspect(&self) -> f64 {
        f64::from(self.width) / f64::from(self.height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gradient;
    use image::{ExtendedColorType, ImageEncoder};

    fn encode(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn png_round_trip_and_lossless_webp() {
        let picture = gradient(7, 5);
        assert_eq!(Rgb8::decode(&picture.encode_png().unwrap()).unwrap(), picture);
        let raw = image::RgbImage::from_raw(7, 5, picture.pixels.clone()).unwrap();
        assert_eq!(Rgb8::decode(&encode(raw, ImageFormat::WebP)).unwrap(), picture);
    }

    /// A file of 120 bytes that says of its EXIF chunk, the last of three, that it has 2.5 GB.
    #[test]
    fn a_webp_chunk_stays_in_its_file() {
        let whole = include_bytes!("../../tests/turned.webp");
        let mut huge = whole.to_vec();
        let exif_size = 90..94;
        huge[exif_size].copy_from_slice(&0x9800_0000_u32.to_le_bytes());
        let message = Rgb8::decode(&huge).unwrap_err().to_string();
        assert!(message.ends_with("a chunk at byte 86 ends behind the file"), "{message}");
        for length in 0..whole.len() {
            assert!(Rgb8::decode(&whole[..length]).is_err(), "{length}");
        }
        let behind = [whole.as_slice(), &[u8::MAX; 20]].concat();
        assert_eq!(Rgb8::decode(&behind).unwrap(), Rgb8::decode(whole).unwrap());
    }

    #[test]
    fn a_bitmap_is_read() {
        let raw = image::RgbImage::from_raw(7, 5, gradient(7, 5).pixels).unwrap();
        assert_eq!(Rgb8::decode(&encode(raw, ImageFormat::Bmp)).unwrap(), gradient(7, 5));
    }

    #[test]
    fn grey_sixteen_bit_and_alpha_become_rgb() {
        let grey = image::GrayImage::from_pixel(1, 1, image::Luma([9]));
        assert_eq!(Rgb8::decode(&encode(grey, ImageFormat::Png)).unwrap().pixels, [9, 9, 9]);
        let deep = image::ImageBuffer::from_pixel(1, 1, image::Rgb([0u16, 32896, 65535]));
        assert_eq!(Rgb8::decode(&encode(deep, ImageFormat::Png)).unwrap().pixels, [0, 128, 255]);
        let mut clear = image::RgbaImage::from_pixel(2, 1, image::Rgba([255, 0, 0, 0]));
        clear.put_pixel(1, 0, image::Rgba([255, 0, 100, 128]));
        assert_eq!(
            Rgb8::decode(&encode(clear, ImageFormat::Png)).unwrap().pixels,
            [255, 255, 255, 255, 127, 177]
        );
    }

    #[test]
    fn broken_bytes_are_errors() {
        let png = gradient(20, 20).encode_png().unwrap();
        for bytes in [&png[..png.len() / 2], b"GIF89a", b"", b"\x89PNG\r\n\x1a\n"] {
            assert!(Rgb8::decode(bytes).is_err());
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_decoded() {
        let mut bytes = Vec::new();
        image::codecs::png::PngEncoder::new(&mut bytes)
            .write_image(&[0], 1, 1, ExtendedColorType::L8)
            .unwrap();
        // Width and height of the header chunk, and its checksum (CRC-32 of the 17 bytes before it).
        bytes[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = Rgb8::decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("65536x65536 is more than"), "{error}");
    }

    #[test]
    fn a_jpeg_that_is_a_bomb_is_refused_too() {
        let mut bytes = include_bytes!("../../tests/restarts.jpg").to_vec();
        // A frame's header: marker, length, precision, height and width.
        let frame = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        bytes[frame + 5..frame + 9].fill(0xff);
        for side in [None, Some(64)] {
            let error = Decoded::for_side(&bytes, side).map(drop).unwrap_err().to_string();
            assert!(error.contains("65535x65535 is more than"), "{error}");
        }
    }

    fn pixel(picture: &Rgb8, x: u32, y: u32) -> [u8; 3] {
        let at = 3 * (y * picture.width + x) as usize;
        std::array::from_fn(|colour| picture.pixels[at + colour])
    }

    /// Values that Pillow reads; see `tests/pictures.py`.
    #[test]
    fn inks_become_colours() {
        let cmyk = [[255, 255, 255], [46, 190, 164], [245, 35, 135], [57, 57, 57]];
        let ycck = [[0, 134, 0], [89, 215, 24], [0, 0, 175], [0, 34, 0]];
        let files: [(&[u8], _); 2] =
            [(include_bytes!("../../tests/cmyk.jpg"), cmyk), (include_bytes!("../../tests/ycck.jpg"), ycck)];
        for (bytes, expected) in files {
            let picture = Rgb8::decode(bytes).unwrap();
            assert_eq!((picture.width, picture.height), (32, 32));
            let found = [(8, 8), (24, 8), (8, 24), (24, 24)].map(|(x, y)| pixel(&picture, x, y));
            let furthest = found.iter().flatten().zip(expected.iter().flatten()).map(|(a, b)| a.abs_diff(*b));
            assert!(furthest.max() <= Some(2), "{found:?} for {expected:?}");
        }
    }

    #[test]
    fn png_and_webp_are_turned_upright() {
        let files: [&[u8]; 2] =
            [include_bytes!("../../tests/turned.png"), include_bytes!("../../tests/turned.webp")];
        for bytes in files {
            let picture = Rgb8::decode(bytes).unwrap();
            // A quarter to the right: what was below on the left is above on the left.
            assert_eq!((picture.width, picture.height), (24, 32));
            assert_eq!(pixel(&picture, 2, 2), [0, 0, 250]);
            assert_eq!(pixel(&picture, 20, 2), [250, 0, 0]);
            assert_eq!(pixel(&picture, 20, 30), [0, 250, 0]);
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        !bytes.iter().fold(!0, |crc, &b| (0..8).fold(crc ^ u32::from(b), |crc, _| step(crc)))
    }

    #[test]
    fn the_difference_hash_outlives_scaling_and_jpeg() {
        let raw = image::RgbImage::from_fn(72, 64, |x, y| {
            let grey = (x / 8 * 110 + y / 8 * 90) as u8;
            image::Rgb([grey, grey, 255 - grey])
        });
        let picture = Rgb8 { width: 72, height: 64, pixels: raw.as_raw().clone() };
        let hash = picture.difference_hash().unwrap();
        assert!((16..48).contains(&hash.count_ones()), "{hash:x}");
        let jpeg = Rgb8::decode(&encode(raw, ImageFormat::Jpeg)).unwrap();
        assert_ne!(jpeg, picture);
        assert_eq!(jpeg.difference_hash().unwrap(), hash);
        assert_eq!(picture.resize(144, 128).unwrap().difference_hash().unwrap(), hash);

        let mut mirrored = picture.clone();
        mirrored.flip_horizontal();
        assert_ne!(mirrored.difference_hash().unwrap(), hash);
        // Brighter to the right in every row: every bit is set.
        let ramp = Rgb8 { width: 9, height: 1, pixels: (0..27).map(|i| i / 3 * 20).collect() };
        assert_eq!(ramp.difference_hash().unwrap(), u64::MAX);
        assert_eq!(Rgb8::filled(3, 2, [9, 8, 7]).difference_hash().unwrap(), 0);
        assert!(Rgb8 { pixels: Vec::new(), ..ramp }.difference_hash().is_err());
    }
}
