//! Pixels, and the few operations on them that training and grids need.

use std::cell::RefCell;
use std::path::Path;

use fast_image_resize as fir;
use image::ImageEncoder;

use crate::atomic_file::write_atomic;
use crate::error::{DataError, Result};

pub(crate) const CHANNELS: usize = 3;
/// Rows of a difference hash, and differences in each: 64 bits.
const HASH_SIDE: u32 = 8;
pub(crate) const WHITE: u8 = 255;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gradient;

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
