//! JPEG files to pixels. They are most of the work of a loader of photographs, and the `image` crate would read the headers
//! of each three times.

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, RgbImage};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;

use super::decoded::{Decoded, check_size, upright_on_white};
#[cfg(feature = "turbojpeg")]
use super::planes::Planes;
use crate::error::{DataError, Result};

/// The second byte of markers (ITU-T T.81, table B.1).
mod marker {
    pub const RESTART: std::ops::RangeInclusive<u8> = 0xd0..=0xd7;
    pub const END_OF_IMAGE: u8 = 0xd9;
    pub const START_OF_SCAN: u8 = 0xda;
    pub const APP1: u8 = 0xe1;
}

/// A picture as [`Decoded::for_side`] wants it.
///
/// # Errors
/// Broken bytes or too many pixels.
pub(crate) fn decode(bytes: &[u8], short_side: Option<u32>) -> Result<Decoded> {
    if is_cut(bytes) {
        return Err(DataError::Picture("JPEG: cut off before the end of the image".to_owned()));
    }
    let orientation = exif(bytes).and_then(Orientation::from_exif_chunk).unwrap_or(Orientation::NoTransforms);
    if let Some(decoded) = decode_turbo(bytes, short_side, orientation)? {
        return Ok(decoded);
    }
    Ok(Decoded::Rgb(upright_on_white(decode_any(bytes)?, orientation)))
}

/// By the general decoder, which also judges what is broken.
fn decode_any(bytes: &[u8]) -> Result<DynamicImage> {
    let broken = |e: DecodeErrors| DataError::Picture(format!("JPEG: {e:?}"));
    let options =
        DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(broken)?;
    let (width, height) = decoder.dimensions().map(|(w, h)| (side(w), side(h))).unwrap_or_default();
    check_size((width, height))?;
    let is_grey = decoder.input_colorspace() == Some(ColorSpace::Luma);
    let colours = if is_grey { ColorSpace::Luma } else { ColorSpace::RGB };
    decoder.set_options(options.jpeg_set_out_colorspace(colours));
    let pixels = decoder.decode().map_err(broken)?;
    let picture = match is_grey {
        true => GrayImage::from_raw(width, height, pixels).map(DynamicImage::from),
        false => RgbImage::from_raw(width, height, pixels).map(DynamicImage::from),
    };
    picture.ok_or_else(|| DataError::Picture("JPEG: fewer pixels than its header says".to_owned()))
}

/// By libjpeg-turbo; `None` where the general decoder has to judge.
///
/// # Errors
/// Too many pixels.
#[cfg(feature = "turbojpeg")]
fn decode_turbo(bytes: &[u8], short_side: Option<u32>, orientation: Orientation) -> Result<Option<Decoded>> {
    use std::cell::RefCell;
    use turbojpeg::{Colorspace, Decompressor};
    thread_local! {
        // Its tables and buffers are worth keeping from picture to picture.
        static DECODER: RefCell<Option<Decompressor>> = const { RefCell::new(None) };
    }
    DECODER.with_borrow_mut(|kept| {
        // Not put back after a broken file, of which it would remember the header that it had begun.
        let Some(mut decoder) = kept.take().or_else(|| Decompressor::new().ok()) else { return Ok(None) };
        let Ok(header) = decoder.read_header(bytes) else { return Ok(None) };
        check_size((side(header.width), side(header.height)))?;
        if matches!(header.colorspace, Colorspace::CMYK | Colorspace::YCCK) {
            *kept = Some(decoder);
            return Ok(None);
        }
        let short = side(header.width.min(header.height));
        // The smallest scale that leaves enough, of those for which it has fast inverse transforms.
        let fits = |part: &u32| short_side.is_some_and(|wanted| short / part >= wanted);
        let part = [8, 4, 2].into_iter().find(fits).unwrap_or(1);
        let will_shrink = short_side.is_some_and(|wanted| wanted < short);
        let decoded = if will_shrink
            && part == 1
            && orientation == Orientation::NoTransforms
            && Planes::are_of(&header)
        {
            Planes::decode(&mut decoder, bytes, &header).map(Decoded::Planes)
        } else {
            let picture = decode_scaled(&mut decoder, bytes, &header, part);
            picture.map(|picture| Decoded::Rgb(upright_on_white(picture, orientation)))
        };
        *kept = decoded.is_some().then_some(decoder);
        Ok(decoded)
    })
}

#[cfg(feature = "turbojpeg")]
fn decode_scaled(
    decoder: &mut turbojpeg::Decompressor,
    bytes: &[u8],
    header: &turbojpeg::DecompressHeader,
    part: u32,
) -> Option<DynamicImage> {
    use turbojpeg::{Image, PixelFormat, ScalingFactor};
    let scale = ScalingFactor::new(1, part as usize);
    decoder.set_scaling_factor(scale).ok()?;
    let (width, height) = (scale.scale(header.width), scale.scale(header.height));
    let pitch = width * super::rgb::CHANNELS;
    let mut pixels = vec![0; height * pitch];
    let image = Image { pixels: pixels.as_mut_slice(), width, pitch, height, format: PixelFormat::RGB };
    decoder.decompress(bytes, image).ok()?;
    RgbImage::from_raw(side(width), side(height), pixels).map(DynamicImage::from)
}

#[cfg(not(feature = "turbojpeg"))]
fn decode_turbo(_: &[u8], _: Option<u32>, _: Orientation) -> Result<Option<Decoded>> {
    Ok(None)
}

fn side(pixels: usize) -> u32 {
    u32::try_from(pixels).unwrap_or(u32::MAX)
}

/// Whether a file has pixels and no end of the image after them: decoders would fill the rest with grey. No bytes of
/// pixels look like that end (T.81, F.1.2.3).
fn is_cut(bytes: &[u8]) -> bool {
    const END: [u8; 2] = [0xff, marker::END_OF_IMAGE];
    const SCAN: [u8; 2] = [0xff, marker::START_OF_SCAN];
    // Thumbnails have ends of their own, but stand before the pixels.
    let mut pairs = bytes.windows(2).rev();
    pairs.find(|pair| *pair == END || *pair == SCAN).is_some_and(|pair| pair == SCAN)
}

/// The TIFF file in the first EXIF segment before the pixels.
fn exif(bytes: &[u8]) -> Option<&[u8]> {
    const START_OF_IMAGE: [u8; 2] = [0xff, 0xd8];
    let mut rest = bytes.strip_prefix(&START_OF_IMAGE)?;
    loop {
        // One byte of ones begins a marker, more may stand before it.
        let marker = rest.strip_prefix(&[0xff])?;
        let fill = marker.iter().take_while(|byte| **byte == 0xff).count();
        let (marker, segment) = marker[fill..].split_first()?;
        if marker::RESTART.contains(marker) {
            rest = segment;
            continue;
        }
        if [marker::START_OF_SCAN, marker::END_OF_IMAGE].contains(marker) {
            return None;
        }
        // The length counts its own two bytes.
        let length = usize::from(u16::from_be_bytes(*segment.first_chunk()?));
        let content = segment.get(2..length)?;
        if let Some(tiff) = content.strip_prefix(b"Exif\0\0").filter(|_| *marker == marker::APP1) {
            return Some(tiff);
        }
        rest = &segment[length..];
    }
}

#[cfg(test)]
mod tests {
    use super::super::rgb::Rgb8;
    use super::*;
    use image::ImageFormat;
    use proptest::prelude::*;
    use std::io::Cursor;

    fn encode(picture: impl Into<DynamicImage>) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.into().write_to(&mut bytes, ImageFormat::Jpeg).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn colours_are_near() {
        let raw = RgbImage::from_pixel(16, 16, image::Rgb([200, 30, 60]));
        let decoded = Rgb8::decode(&encode(raw)).unwrap();
        for pixel in decoded.pixels.chunks(3) {
            assert!(pixel.iter().zip([200, 30, 60]).all(|(&got, want)| (i32::from(got) - want).abs() < 6));
        }
    }

    #[test]
    fn what_will_be_scaled_down_is_decoded_no_larger_than_needed_and_looks_the_same() {
        let smooth = RgbImage::from_fn(64, 48, |x, y| image::Rgb([x as u8 * 4, y as u8 * 5, 90]));
        let jpeg = encode(smooth);
        let whole = Rgb8::decode(&jpeg).unwrap();
        for (short_side, part) in [(49, 1), (48, 1), (25, 1), (24, 2), (12, 4), (6, 8), (1, 8)] {
            let part = if cfg!(feature = "turbojpeg") { part } else { 1 };
            let reduced = decode(&jpeg, Some(short_side)).unwrap();
            assert_eq!(reduced.size(), (64 / part, 48 / part), "short side {short_side}");
            let expected = whole.resize(64 / part, 48 / part).unwrap();
            assert_near(&reduced.into_rgb().unwrap(), &expected, 8);
        }
    }

    /// As Pillow refuses them. A file may go on behind its end.
    #[test]
    fn a_cut_file_is_broken() {
        let jpeg = encode(RgbImage::from_fn(64, 48, |x, y| {
            image::Rgb([(x * 37 % 256) as u8, (y * 91 % 256) as u8, 90])
        }));
        for cut in [jpeg.len() - 1, jpeg.len() * 3 / 4, jpeg.len() / 2] {
            for short_side in [None, Some(12), Some(40)] {
                let refused = decode(&jpeg[..cut], short_side).err().unwrap().to_string();
                assert!(refused.contains("cut off"), "{refused}");
            }
        }
        let followed = [&jpeg[..], b"more"].concat();
        assert_eq!(Rgb8::decode(&followed).unwrap(), Rgb8::decode(&jpeg).unwrap());
    }

    #[track_caller]
    fn assert_near(got: &Rgb8, expected: &Rgb8, tolerance: u8) {
        assert_eq!((got.width, got.height), (expected.width, expected.height));
        let differences = got.pixels.iter().zip(&expected.pixels).map(|(a, b)| a.abs_diff(*b));
        assert!(differences.max() <= Some(tolerance));
    }

    #[test]
    fn a_broken_file_changes_nothing_for_the_next() {
        let jpeg = encode(RgbImage::from_fn(33, 17, |x, y| {
            image::Rgb([(x * 61 % 256) as u8, (y * 97 % 256) as u8, 9])
        }));
        let before = Rgb8::decode(&jpeg).unwrap();
        for cut in [3, 20, 200, jpeg.len() / 2] {
            let _ = Rgb8::decode(&jpeg[..cut]);
            assert_eq!(Rgb8::decode(&jpeg).unwrap(), before, "after {cut} bytes");
        }
    }

    /// The same coefficients in a progressive file, which another decoder reads than that of `csrc/jpeg_pairs.c`, have the
    /// same pixels.
    #[cfg(feature = "turbojpeg")]
    #[track_caller]
    fn assert_as_progressive(jpeg: &[u8], what: &str) {
        use turbojpeg::{Transform, TransformOp, transform};
        let mut to_progressive = Transform::op(TransformOp::None);
        to_progressive.progressive = true;
        let progressive = transform(&to_progressive, jpeg).unwrap();
        for short_side in [None, Some(16), Some(8), Some(4)] {
            let [one, other] = [jpeg, &progressive].map(|bytes| {
                let decoded = decode_turbo(bytes, short_side, Orientation::NoTransforms).unwrap();
                decoded.unwrap().into_rgb().unwrap()
            });
            assert!(one == other, "{what}, for a short side of {short_side:?}");
        }
    }

    #[cfg(feature = "turbojpeg")]
    #[test]
    fn pairs_of_coefficients_are_those_of_the_library() {
        use rand::{Rng as _, SeedableRng};
        use turbojpeg::{Compressor, Subsamp};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for noise in [1, 20, 250] {
            let picture = RgbImage::from_fn(rng.random_range(33..150), rng.random_range(33..90), |x, y| {
                image::Rgb(
                    [x, y, x + y].map(|place| (place * 3 % 256) as u8 ^ rng.random_range(0..noise) as u8),
                )
            });
            for quality in [1, 30, 75, 90, 100] {
                for (subsamp, is_optimal) in [
                    (Subsamp::Sub2x2, false),
                    (Subsamp::Sub2x1, true),
                    (Subsamp::None, true),
                    (Subsamp::Gray, false),
                ] {
                    let mut compressor = Compressor::new().unwrap();
                    compressor.set_quality(quality).unwrap();
                    compressor.set_subsamp(subsamp).unwrap();
                    compressor.set_optimize(is_optimal).unwrap();
                    let image = turbojpeg::Image {
                        pixels: picture.as_raw().as_slice(),
                        width: picture.width() as usize,
                        pitch: picture.width() as usize * 3,
                        height: picture.height() as usize,
                        format: turbojpeg::PixelFormat::RGB,
                    };
                    let jpeg = compressor.compress_to_vec(image).unwrap();
                    assert_as_progressive(&jpeg, &format!("{noise} {quality} {subsamp:?}"));
                }
            }
        }
    }

    /// A file by Pillow, `save(.., quality=75, restart_marker_blocks=2)`.
    #[cfg(feature = "turbojpeg")]
    #[test]
    fn restarts_are_those_of_the_library() {
        let jpeg = include_bytes!("../../tests/restarts.jpg");
        assert!(jpeg.windows(2).any(|pair| pair == [0xff, *marker::RESTART.start()]));
        assert_as_progressive(jpeg, "restarts");
    }

    /// A JPEG file with these segments right after its start.
    fn with_segments(segments: &[(u8, &[u8])]) -> Vec<u8> {
        let jpeg = encode(RgbImage::from_fn(16, 8, |x, _| image::Rgb([x as u8 * 15; 3])));
        let mut bytes = jpeg[..2].to_vec();
        for (marker, content) in segments {
            bytes.extend([0xff, *marker]);
            bytes.extend((content.len() as u16 + 2).to_be_bytes());
            bytes.extend(*content);
        }
        [&bytes, &jpeg[2..]].concat()
    }

    #[test]
    fn exif_says_what_is_up() {
        // Big-endian TIFF with one entry: tag 0x112, a short, one of it, 6: a quarter turn to the right.
        let tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        let exif = [b"Exif\0\0", tiff.as_slice()].concat();
        let xmp = (marker::APP1, b"http://ns.adobe.com/xap/1.0/\0".as_slice());
        let turned = Rgb8::decode(&with_segments(&[xmp, (marker::APP1, &exif)])).unwrap();
        assert_eq!((turned.width, turned.height), (8, 16));
        assert!(turned.pixels[0] < 40 && turned.pixels[turned.pixels.len() - 1] > 200);
        for other in [&[xmp][..], &[(0xe2, &exif)], &[]] {
            assert_eq!(Rgb8::decode(&with_segments(other)).unwrap().width, 16);
        }
        let filled = [&[0xff; 3][..], &with_segments(&[(marker::APP1, &exif)])[2..]].concat();
        assert_eq!(super::exif(&[&[0xff, 0xd8], &filled[..]].concat()), Some(tiff.as_slice()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(segments in proptest::collection::vec((any::<u8>(), any::<Vec<u8>>()), 0..4), cut in 0usize..400) {
            let segments: Vec<_> = segments.iter().map(|(marker, content)| (*marker, content.as_slice())).collect();
            let bytes = with_segments(&segments);
            let found = super::exif(&bytes[..cut.min(bytes.len())]);
            let first = segments.iter().find(|(marker, content)| *marker == marker::APP1 && content.starts_with(b"Exif\0\0"));
            prop_assert!(found.is_none() || first.is_some());
        }
    }
}
