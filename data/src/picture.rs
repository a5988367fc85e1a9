//! RGB pictures: decoding, encoding and the few operations that training and grids need.

use std::cell::RefCell;
use std::io::Cursor;
use std::path::Path;

use fast_image_resize as fir;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageEncoder, ImageFormat, ImageReader};

use crate::atomic_file::write_atomic;
use crate::error::{DataError, Result};
use crate::jpeg;

/// Larger pictures are refused before they are decoded (a decompression bomb must not take the memory).
pub const MAX_PIXELS: u64 = 1 << 28;
const FORMATS: [ImageFormat; 4] = [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp];
pub(crate) const CHANNELS: usize = 3;
/// Rows of a difference hash, and differences in each: 64 bits.
const HASH_SIDE: u32 = 8;
const WHITE: u8 = 255;

thread_local! {
    // Its buffers are worth keeping from picture to picture.
    static RESIZER: RefCell<fir::Resizer> = RefCell::new(fir::Resizer::new());
}

/// An 8-bit RGB picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb8 {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height * width * 3` bytes: rows from the top, pixels from the left, channels R, G, B.
    pub pixels: Vec<u8>,
}

impl Rgb8 {
    /// A picture of one colour.
    pub fn filled(width: u32, height: u32, colour: [u8; 3]) -> Self {
        let pixels = colour.repeat(width as usize * height as usize);
        Self { width, height, pixels }
    }

    /// Decodes JPEG, PNG, WebP or BMP: upright as its EXIF orientation says, grey, CMYK and 16 bit converted to 8-bit
    /// RGB, transparency put on white.
    ///
    /// # Errors
    /// Another format, broken bytes, or more than [`MAX_PIXELS`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Decoded::for_side(bytes, None)?.into_rgb()
    }

    /// PNG bytes.
    pub fn encode_png(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        image::codecs::png::PngEncoder::new(&mut bytes)
            .write_image(&self.pixels, self.width, self.height, image::ExtendedColorType::Rgb8)
            .map_err(|e| self.size_error(format!("cannot be written as PNG: {e}")))?;
        Ok(bytes)
    }

    /// Writes a PNG file that appears whole or not at all.
    pub fn save_png(&self, path: &Path) -> Result<()> {
        write_atomic(path, &self.encode_png()?)
    }

    /// The rectangle of `width x height` whose upper left corner is (`x`, `y`).
    ///
    /// # Errors
    /// The rectangle is empty or reaches outside.
    pub fn crop(&self, x: u32, y: u32, width: u32, height: u32) -> Result<Self> {
        let inside = |start: u32, length: u32, limit: u32| {
            length > 0 && start.checked_add(length).is_some_and(|end| end <= limit)
        };
        if !inside(x, width, self.width) || !inside(y, height, self.height) {
            return Err(self.size_error(format!("cannot crop {width}x{height} at ({x}, {y})")));
        }
        let mut pixels = Vec::with_capacity(width as usize * height as usize * CHANNELS);
        for row in y..y + height {
            pixels.extend_from_slice(&self.row(row)[x as usize * CHANNELS..][..width as usize * CHANNELS]);
        }
        Ok(Self { width, height, pixels })
    }

    /// Scales to exactly `width x height` (bilinear with antialiasing); keeping the aspect is the caller's business.
    ///
    /// # Errors
    /// Either size is zero.
    pub fn resize(&self, width: u32, height: u32) -> Result<Self> {
        self.resize_part((width, height), Part::whole((width, height)))
    }

    /// A part of what [`Rgb8::resize`] would make; the rest is not computed.
    ///
    /// # Errors
    /// A size is zero, or the part reaches outside.
    pub(crate) fn resize_part(&self, (width, height): (u32, u32), part: Part) -> Result<Self> {
        if (width, height) == (self.width, self.height) {
            return self.crop(part.x, part.y, part.width, part.height);
        }
        let fail = |reason: String| self.size_error(format!("cannot resize to {width}x{height}: {reason}"));
        if width == 0 || height == 0 {
            return Err(fail("expected at least 1x1".to_owned()));
        }
        let source = fir::images::ImageRef::new(self.width, self.height, &self.pixels, fir::PixelType::U8x3)
            .map_err(|e| fail(e.to_string()))?;
        let mut target = fir::images::Image::new(part.width, part.height, fir::PixelType::U8x3);
        // Begin and length in the source of a stretch of the target.
        let stretch = |start: u32, length: u32, target: u32, source: u32| {
            let scale = f64::from(source) / f64::from(target);
            let begin = f64::from(start) * scale;
            // Rounding must not lead outside.
            (begin, (f64::from(length) * scale).min(f64::from(source) - begin))
        };
        let (left, columns) = stretch(part.x, part.width, width, self.width);
        let (top, rows) = stretch(part.y, part.height, height, self.height);
        let options = fir::ResizeOptions::new()
            .resize_alg(fir::ResizeAlg::Convolution(fir::FilterType::Bilinear))
            .crop(left, top, columns, rows);
        let scale = |resizer: &mut fir::Resizer| resizer.resize(&source, &mut target, &options);
        RESIZER.with_borrow_mut(scale).map_err(|e| fail(e.to_string()))?;
        Ok(Self { width: part.width, height: part.height, pixels: target.into_vec() })
    }

    /// Mirrors left and right.
    pub fn flip_horizontal(&mut self) {
        for row in self.pixels.chunks_exact_mut(self.width as usize * CHANNELS) {
            let (pixels, _) = row.as_chunks_mut::<CHANNELS>();
            pixels.reverse();
        }
    }

    /// Multiplies brightness, then contrast (about the mean luma), then saturation (about each pixel's luma).
    pub fn scale_colours(&mut self, brightness: f32, contrast: f32, saturation: f32) {
        let (pixels, _) = self.pixels.as_chunks_mut::<CHANNELS>();
        let count = pixels.len().max(1) as f32;
        let bright = |pixel: &[u8; CHANNELS]| pixel.map(|value| f32::from(value) * brightness);
        let mean = pixels.iter().map(|pixel| luma(&bright(pixel))).sum::<f32>() / count;
        for pixel in pixels {
            let contrasted = bright(pixel).map(|value| mean + (value - mean) * contrast);
            let own = luma(&contrasted);
            // A float becomes a byte by saturation.
            *pixel = contrasted.map(|value| (own + (value - own) * saturation).round() as u8);
        }
    }

    /// The difference hash: of the picture scaled to 9 columns and 8 rows of grey, a bit for each pixel that is darker than
    /// its right neighbour. Another encoding or size of a picture mostly has the same; so have all pictures of one colour.
    ///
    /// # Errors
    /// Fewer pixels than width and height say.
    pub(crate) fn difference_hash(&self) -> Result<u64> {
        let columns = HASH_SIDE + 1;
        let small = self.resize(columns, HASH_SIDE)?;
        let (pixels, _) = small.pixels.as_chunks::<CHANNELS>();
        // Whole numbers, so that the traces of compression in an even area make no difference.
        let grey: Vec<u8> = pixels.iter().map(|pixel| luma(&pixel.map(f32::from)).round() as u8).collect();
        let pairs = grey.chunks(columns as usize).flat_map(|row| row.windows(2));
        Ok(pairs.fold(0, |hash, pair| hash << 1 | u64::from(pair[0] < pair[1])))
    }

    /// Copies `other` to (`x`, `y`); what does not fit is cut off.
    pub fn paste(&mut self, other: &Rgb8, x: u32, y: u32) {
        let columns = other.width.min(self.width.saturating_sub(x)) as usize * CHANNELS;
        for row in 0..other.height.min(self.height.saturating_sub(y)) {
            let at = ((y + row) as usize * self.width as usize + x as usize) * CHANNELS;
            self.pixels[at..at + columns].copy_from_slice(&other.row(row)[..columns]);
        }
    }

    pub(crate) fn size_error(&self, reason: String) -> DataError {
        DataError::PictureSize { width: self.width, height: self.height, reason }
    }

    fn row(&self, row: u32) -> &[u8] {
        let length = self.width as usize * CHANNELS;
        &self.pixels[row as usize * length..][..length]
    }
}

/// A decoded picture, upright, that waits for its first step.
pub(crate) enum Decoded {
    /// Its pixels.
    Rgb(Rgb8),
    /// As a JPEG stores it.
    #[cfg(feature = "turbojpeg")]
    Planes(crate::planes::Planes),
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

    /// Columns and rows.
    pub(crate) fn size(&self) -> (u32, u32) {
        match self {
            Self::Rgb(picture) => (picture.width, picture.height),
            #[cfg(feature = "turbojpeg")]
            Self::Planes(planes) => planes.size(),
        }
    }

    /// # Errors
    /// When planes cannot be converted.
    pub(crate) fn into_rgb(self) -> Result<Rgb8> {
        match self {
            Self::Rgb(picture) => Ok(picture),
            #[cfg(feature = "turbojpeg")]
            Self::Planes(planes) => planes.resize_part(planes.size(), Part::whole(planes.size())),
        }
    }

    /// A part of the picture scaled to `size`.
    ///
    /// # Errors
    /// A size is zero, or the part reaches outside.
    pub(crate) fn resize_part(&self, size: (u32, u32), part: Part) -> Result<Rgb8> {
        match self {
            Self::Rgb(picture) => picture.resize_part(size, part),
            #[cfg(feature = "turbojpeg")]
            Self::Planes(planes) => planes.resize_part(size, part),
        }
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

/// A rectangle by its upper left corner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub x: u32,
    pub y: u32,
    pub width: u32,
    pub height: u32,
}

impl Part {
    /// All of a picture of this width and height.
    pub(crate) fn whole((width, height): (u32, u32)) -> Self {
        Self { x: 0, y: 0, width, height }
    }
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

/// Brightness as ITU-R BT.601 weighs the channels.
fn luma([red, green, blue]: &[f32; CHANNELS]) -> f32 {
    0.299 * red + 0.587 * green + 0.114 * blue
}

/// Arranges pictures row by row in `columns`, on white, `gap` pixels apart and from the border. Cells have the size of the
/// largest picture.
pub fn grid(pictures: &[Rgb8], columns: u32, gap: u32) -> Rgb8 {
    let columns = columns.clamp(1, (pictures.len() as u32).max(1));
    let rows = (pictures.len() as u32).div_ceil(columns);
    let cell_width = gap + pictures.iter().map(|p| p.width).max().unwrap_or(0);
    let cell_height = gap + pictures.iter().map(|p| p.height).max().unwrap_or(0);
    let mut sheet = Rgb8::filled(gap + columns * cell_width, gap + rows * cell_height, [WHITE; 3]);
    for (i, picture) in (0..).zip(pictures) {
        sheet.paste(picture, gap + i % columns * cell_width, gap + i / columns * cell_height);
    }
    sheet
}

/// # Errors
/// More than [`MAX_PIXELS`].
pub(crate) fn check_size((width, height): (u32, u32)) -> Result<()> {
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(DataError::Picture(format!("{width}x{height} is more than {MAX_PIXELS} pixels")));
    }
    Ok(())
}

/// Turned as its orientation says, transparency put on white.
pub(crate) fn upright_on_white(mut picture: DynamicImage, orientation: Orientation) -> Rgb8 {
    picture.apply_orientation(orientation);
    let (width, height) = (picture.width(), picture.height());
    if !picture.color().has_alpha() {
        return Rgb8 { width, height, pixels: picture.into_rgb8().into_raw() };
    }
    let blend = |value: u8, alpha: u8| {
        let (value, alpha, white) = (u32::from(value), u32::from(alpha), u32::from(WHITE));
        // At most 255, because it is a rounded mean of two bytes.
        ((value * alpha + white * (white - alpha) + white / 2) / white) as u8
    };
    let pixels = picture.into_rgba8().pixels().flat_map(|p| [0, 1, 2].map(|c| blend(p[c], p[3]))).collect();
    Rgb8 { width, height, pixels }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::ExtendedColorType;

    fn encode(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn gradient(width: u32, height: u32) -> Rgb8 {
        let pixels = (0..width * height * 3).map(|i| (i % 251) as u8).collect();
        Rgb8 { width, height, pixels }
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
        let whole = include_bytes!("../tests/turned.webp");
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
        let mut bytes = include_bytes!("../tests/restarts.jpg").to_vec();
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
            [(include_bytes!("../tests/cmyk.jpg"), cmyk), (include_bytes!("../tests/ycck.jpg"), ycck)];
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
            [include_bytes!("../tests/turned.png"), include_bytes!("../tests/turned.webp")];
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
    fn crop_flip_and_resize() {
        let picture = gradient(4, 3);
        let cropped = picture.crop(1, 1, 2, 2).unwrap();
        assert_eq!(cropped.pixels[..6], picture.pixels[15..21]);
        assert_eq!(cropped.pixels[6..], picture.pixels[27..33]);
        assert!(picture.crop(3, 0, 2, 1).unwrap_err().to_string().contains("cannot crop 2x1 at (3, 0)"));
        assert!(picture.crop(u32::MAX, 0, 2, 1).is_err());

        let mut flipped = picture.clone();
        flipped.flip_horizontal();
        assert_eq!(flipped.pixels[..3], picture.pixels[9..12]);
        flipped.flip_horizontal();
        assert_eq!(flipped, picture);

        let plain = Rgb8::filled(9, 7, [10, 20, 30]);
        assert_eq!(plain.resize(18, 3).unwrap(), Rgb8::filled(18, 3, [10, 20, 30]));
        assert!(plain.resize(0, 3).is_err());
    }

    #[test]
    fn colours_are_scaled_one_after_the_other() {
        let scaled = |brightness, contrast, saturation| {
            let mut picture = Rgb8 { width: 2, height: 1, pixels: vec![200, 100, 0, 40, 40, 40] };
            picture.scale_colours(brightness, contrast, saturation);
            picture.pixels
        };
        assert_eq!(scaled(1.0, 1.0, 1.0), [200, 100, 0, 40, 40, 40]);
        assert_eq!(scaled(1.5, 1.0, 1.0), [255, 150, 0, 60, 60, 60]);
        // Lumas 118.5 and 40, their mean 79.25.
        assert_eq!(scaled(1.0, 0.0, 1.0), [79; 6]);
        assert_eq!(scaled(1.0, 1.0, 0.0), [119, 119, 119, 40, 40, 40]);
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

    #[test]
    fn grids_are_laid_out_on_white() {
        let (red, blue) = (Rgb8::filled(2, 2, [255, 0, 0]), Rgb8::filled(1, 1, [0, 0, 255]));
        let sheet = grid(&[red.clone(), blue, red], 2, 1);
        assert_eq!((sheet.width, sheet.height), (7, 7));
        let pixel = |x: usize, y: usize| &sheet.pixels[(y * 7 + x) * 3..][..3];
        assert_eq!(
            (pixel(1, 1), pixel(4, 1), pixel(5, 1)),
            (&[255, 0, 0][..], &[0, 0, 255][..], &[255; 3][..])
        );
        assert_eq!((pixel(2, 5), pixel(4, 4), pixel(0, 0)), (&[255, 0, 0][..], &[255; 3][..], &[255; 3][..]));
        assert_eq!(grid(&[], 3, 2).width, 4);
    }

    #[test]
    fn saving_to_a_missing_folder_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("absent/out.png");
        let error = gradient(1, 1).save_png(&path).unwrap_err().to_string();
        assert!(error.contains("cannot write") && error.contains("absent/out.png"), "{error}");
    }
}
