//! A JPEG's picture as it is stored: brightness, and two differences of colour that mostly have half its size. To scale
//! these is half the work of scaling three colours, and colours have to be made for what a crop leaves alone.

use turbojpeg::{Colorspace, DecompressHeader, Decompressor, ScalingFactor, Subsamp, YuvImage};
use wide::{u8x16, u16x8};
use yuv::{YuvPlanarImage, YuvRange, YuvStandardMatrix, yuv444_to_rgb};

use super::rgb::{CHANNELS, Part, Rgb8};
use crate::error::{DataError, Result};

/// Rows of planes follow each other without a gap.
const ALIGN: usize = 1;
/// Samples in a vector.
const LANES: usize = u16x8::LANES as usize;
/// A vector's samples are 256ths.
const FRACTION_BITS: u32 = 8;
/// A product with a weight, of which this is 1, keeps its upper 16 bits.
const ONE: f64 = 65536.0;

/// Y, Cb and Cr (ITU-T T.871) of a picture, one after the other, and a few bytes so that vectors can be read anywhere.
pub(crate) struct Planes(YuvImage<Vec<u8>>);

impl Planes {
    /// Whether a picture is stored so.
    pub(crate) fn are_of(header: &DecompressHeader) -> bool {
        header.colorspace == Colorspace::YCbCr && !matches!(header.subsamp, Subsamp::Gray | Subsamp::Unknown)
    }

    /// The planes of a file with this header; `None` where its bytes are broken.
    pub(crate) fn decode(
        decoder: &mut Decompressor,
        bytes: &[u8],
        header: &DecompressHeader,
    ) -> Option<Self> {
        let DecompressHeader { width, height, subsamp, .. } = *header;
        let length = turbojpeg::yuv_pixels_len(width, ALIGN, height, subsamp).ok()?;
        let mut image = YuvImage { pixels: vec![0; length + LANES], width, align: ALIGN, height, subsamp };
        decoder.set_scaling_factor(ScalingFactor::ONE).ok()?;
        decoder.decompress_to_yuv(bytes, image.as_deref_mut()).ok()?;
        Some(Self(image))
    }

    /// Columns and rows of the picture.
    pub(crate) fn size(&self) -> (u32, u32) {
        (self.0.width as u32, self.0.height as u32)
    }

    /// A part of the picture scaled to `size` (bilinear with antialiasing, as [`Rgb8::resize`]).
    ///
    /// # Errors
    /// A size is zero, or the part is empty or reaches outside.
    pub(crate) fn resize_part(&self, size: (u32, u32), part: Part) -> Result<Rgb8> {
        let fail = |reason: String| {
            let (width, height) = self.size();
            let reason = format!("cannot resize to {}x{}: {reason}", size.0, size.1);
            DataError::PictureSize { width, height, reason }
        };
        let inside = |start: u32, length: u32, limit: u32| {
            length > 0 && start.checked_add(length).is_some_and(|end| end <= limit)
        };
        if !inside(part.x, part.width, size.0) || !inside(part.y, part.height, size.1) {
            return Err(fail(format!(
                "no part of {}x{} at ({}, {})",
                part.width, part.height, part.x, part.y
            )));
        }
        let image = &self.0;
        let (luma, chroma) = (image.y_size(), image.uv_size());
        let (_, u_plane) = image.pixels.split_at(luma.0 * luma.1);
        let (_, v_plane) = u_plane.split_at(chroma.0 * chroma.1);
        // A difference of colour lies in the middle of the pixels that it is for. Planes may end with columns and rows that
        // are not of the picture.
        let weights = |stored: (usize, usize), subsamp: (usize, usize)| {
            let of = |pixels: usize, subsamp: usize| pixels as f64 / subsamp as f64;
            let columns = Weights::new(of(image.width, subsamp.0), stored.0, size.0, (part.x, part.width));
            let rows = Weights::new(of(image.height, subsamp.1), stored.1, size.1, (part.y, part.height));
            (columns, rows)
        };
        let of_luma = weights(luma, (1, 1));
        let of_chroma = weights(chroma, image.subsamp.size());
        let planes = YuvPlanarImage {
            y_plane: &scale(&image.pixels, luma.0, &of_luma),
            y_stride: part.width,
            u_plane: &scale(u_plane, chroma.0, &of_chroma),
            u_stride: part.width,
            v_plane: &scale(v_plane, chroma.0, &of_chroma),
            v_stride: part.width,
            width: part.width,
            height: part.height,
        };
        let pitch = part.width * CHANNELS as u32;
        let mut pixels = vec![0; pitch as usize * part.height as usize];
        yuv444_to_rgb(&planes, &mut pixels, pitch, YuvRange::Full, YuvStandardMatrix::Bt601)
            .map_err(|e| fail(e.to_string()))?;
        Ok(Rgb8 { width: part.width, height: part.height, pixels })
    }
}

/// What samples of a row or column weigh in each of the scaled ones.
struct Weights {
    /// The first of the samples that weigh anything.
    firsts: Vec<usize>,
    /// `taps` for each, each in all lanes.
    weights: Vec<u16x8>,
    taps: usize,
}

impl Weights {
    /// Of a part, by start and length, of `target` samples that the first `used` of `stored` ones are scaled to: a
    /// triangle around the middle of each, as far as the next one or the next sample, whichever is further.
    fn new(used: f64, stored: usize, target: u32, (start, length): (u32, u32)) -> Self {
        let step = used / f64::from(target);
        let reach = step.max(1.0);
        let taps = ((2.0 * reach).ceil() as usize).min(stored);
        let (mut firsts, mut weights) = (Vec::new(), Vec::new());
        for scaled in start..start + length {
            let middle = (f64::from(scaled) + 0.5) * step - 0.5;
            // A fraction is cut off, and below 0 there is 0.
            let first = ((middle - reach + 1.0) as usize).min(stored - taps);
            let triangle =
                (first..first + taps).map(|sample| (1.0 - (sample as f64 - middle).abs() / reach).max(0.0));
            let sum: f64 = triangle.clone().sum();
            weights.extend(triangle.map(|weight| u16x8::splat((weight / sum * ONE + 0.5) as u16)));
            firsts.push(first);
        }
        Self { firsts, weights, taps }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[u16x8])> {
        self.firsts.iter().copied().zip(self.weights.chunks(self.taps))
    }

    /// The samples that weigh anything.
    fn span(&self) -> std::ops::Range<usize> {
        let first = self.firsts.iter().min().copied().unwrap_or(0);
        first..self.firsts.iter().max().map_or(first, |last| last + self.taps)
    }
}

/// A plane of `pitch` columns, behind whose last row there are samples for a vector, scaled by the weights of its columns and
/// of its rows. Sums do not overflow, because the weights of each come to [`ONE`].
fn scale(plane: &[u8], pitch: usize, (columns, rows): &(Weights, Weights)) -> Vec<u8> {
    let span = columns.span();
    let width = columns.firsts.len();
    let mut scaled = vec![0; width * rows.firsts.len()];
    // Tiles of as many rows as columns: of the scaled rows before their columns are scaled, and after.
    let mut before = vec![[u16x8::ZERO; LANES]; span.len().div_ceil(LANES)];
    let mut after = vec![[u16x8::ZERO; LANES]; width.div_ceil(LANES)];
    let mut line = vec![[0; LANES]; after.len()];
    let mut rows = rows.iter();
    for block in scaled.chunks_mut(width * LANES) {
        before.fill([u16x8::ZERO; LANES]);
        for (lane, (first, weights)) in rows.by_ref().take(LANES).enumerate() {
            for (row, weight) in (first..).zip(weights) {
                let (samples, _) = plane[row * pitch + span.start..].as_chunks::<LANES>();
                for (tile, samples) in before.iter_mut().zip(samples) {
                    tile[lane] += widened(samples).mul_keep_high(*weight);
                }
            }
        }
        for tile in &mut before {
            *tile = u16x8::transpose(*tile);
        }
        let before = before.as_flattened();
        for (result, (first, weights)) in after.as_flattened_mut().iter_mut().zip(columns.iter()) {
            let products = before[first - span.start..].iter().zip(weights).map(|(s, w)| s.mul_keep_high(*w));
            *result = products.fold(u16x8::splat(1 << (FRACTION_BITS - 1)), |sum, product| sum + product);
        }
        for tile in &mut after {
            *tile = u16x8::transpose(*tile);
        }
        for (lane, row) in block.chunks_mut(width).enumerate() {
            for (values, tile) in line.iter_mut().zip(&after) {
                *values = tile[lane].to_array();
            }
            for (value, fraction) in row.iter_mut().zip(line.as_flattened()) {
                *value = (fraction >> FRACTION_BITS) as u8;
            }
        }
    }
    scaled
}

fn widened(samples: &[u8; LANES]) -> u16x8 {
    let mut padded = [0; u8x16::LANES as usize];
    padded[..LANES].copy_from_slice(samples);
    u16x8::from_u8x16_low(u8x16::new(padded)) << FRACTION_BITS
}

#[cfg(test)]
mod tests {
    use super::super::decoded::Decoded;
    use super::*;
    use proptest::prelude::*;
    use turbojpeg::{Compressor, Image, PixelFormat};

    const SUBSAMPS: [Subsamp; 6] =
        [Subsamp::None, Subsamp::Sub2x1, Subsamp::Sub2x2, Subsamp::Sub1x2, Subsamp::Sub4x1, Subsamp::Sub1x4];

    fn encode(picture: &Rgb8, subsamp: Subsamp) -> Vec<u8> {
        let mut compressor = Compressor::new().unwrap();
        compressor.set_quality(95).unwrap();
        compressor.set_subsamp(subsamp).unwrap();
        let (width, height) = (picture.width as usize, picture.height as usize);
        let pixels = picture.pixels.as_slice();
        let image = Image { pixels, width, pitch: width * CHANNELS, height, format: PixelFormat::RGB };
        compressor.compress_to_vec(image).unwrap()
    }

    fn planes(jpeg: &[u8]) -> Planes {
        let mut decoder = Decompressor::new().unwrap();
        let header = decoder.read_header(jpeg).unwrap();
        assert!(Planes::are_of(&header));
        Planes::decode(&mut decoder, jpeg, &header).unwrap()
    }

    fn largest_difference(one: &Rgb8, other: &Rgb8) -> u8 {
        assert_eq!((one.width, one.height), (other.width, other.height));
        one.pixels.iter().zip(&other.pixels).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
    }

    fn picture(width: u32, height: u32, pixel: impl Fn(f64, f64) -> [u8; 3]) -> Rgb8 {
        let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        let share = |at: u32, of: u32| f64::from(at) / f64::from(of);
        let pixels = places.flat_map(|(x, y)| pixel(share(x, width), share(y, height))).collect();
        Rgb8 { width, height, pixels }
    }

    proptest! {
        /// Of greys nothing is lost on the way to planes and back: what is left is how both scale.
        #[test]
        fn any_part_of_any_size_is_scaled_as_pixels_are(
            (width, height) in (2u32..70, 2u32..70),
            scale in (0.51f64..1.0, 0.51f64..1.0),
            corner in (0.0f64..0.9, 0.0f64..0.9),
            seed: u64,
        ) {
            use rand::{Rng as _, SeedableRng};
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            let noise: Vec<u8> = (0..width * height).map(|_| rng.random()).collect();
            let pixels = noise.iter().flat_map(|value| [*value; 3]).collect();
            let jpeg = encode(&Rgb8 { width, height, pixels }, Subsamp::None);
            let times = |side: u32, scale: f64| ((f64::from(side) * scale) as u32).max(1);
            let size = (times(width, scale.0), times(height, scale.1));
            let (x, y) = ((f64::from(size.0) * corner.0) as u32, (f64::from(size.1) * corner.1) as u32);
            let part = Part { x, y, width: size.0 - x, height: size.1 - y };
            let scaled = planes(&jpeg).resize_part(size, part).unwrap();
            let whole = Rgb8::decode(&jpeg).unwrap().resize(size.0, size.1).unwrap();
            let expected = whole.crop(part.x, part.y, part.width, part.height).unwrap();
            prop_assert!(largest_difference(&scaled, &expected) <= 1);
        }
    }

    #[test]
    fn smooth_colours_are_those_of_pixels_for_every_subsampling() {
        let smooth = picture(93, 71, |x, y| [(x * 250.0) as u8, (y * 250.0) as u8, ((x + y) * 125.0) as u8]);
        for subsamp in SUBSAMPS {
            let jpeg = encode(&smooth, subsamp);
            for size in [(92, 70), (60, 46), (47, 36)] {
                let scaled = planes(&jpeg).resize_part(size, Part::whole(size)).unwrap();
                let expected = Rgb8::decode(&jpeg).unwrap().resize(size.0, size.1).unwrap();
                let most = largest_difference(&scaled, &expected);
                assert!(most <= 6, "{subsamp:?} {size:?}: {most}");
            }
        }
    }

    #[test]
    fn at_their_own_size_they_are_the_picture() {
        let smooth = picture(33, 21, |x, y| [(x * 250.0) as u8, (y * 250.0) as u8, 90]);
        let jpeg = encode(&smooth, Subsamp::Sub2x2);
        let all = Decoded::Planes(planes(&jpeg)).into_rgb().unwrap();
        assert!(largest_difference(&all, &Rgb8::decode(&jpeg).unwrap()) <= 6);
    }

    #[test]
    fn white_stays_white_and_black_stays_black() {
        for colour in [[255; 3], [0; 3]] {
            let jpeg = encode(&Rgb8::filled(40, 40, colour), Subsamp::Sub2x2);
            let scaled = planes(&jpeg).resize_part((37, 21), Part::whole((37, 21))).unwrap();
            assert_eq!(scaled, Rgb8::filled(37, 21, colour));
        }
    }

    #[test]
    fn parts_outside_are_refused() {
        let jpeg = encode(&Rgb8::filled(40, 30, [1, 2, 3]), Subsamp::Sub2x2);
        for (x, width) in [(0, 0), (1, 20), (20, 1), (u32::MAX, 2)] {
            let part = Part { x, y: 0, width, height: 15 };
            let refused = planes(&jpeg).resize_part((20, 15), part).unwrap_err().to_string();
            assert!(refused.contains("cannot resize to 20x15"), "{refused}");
        }
    }
}
