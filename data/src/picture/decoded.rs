//! What a decoder hands on.

use image::DynamicImage;
use image::metadata::Orientation;

#[cfg(feature = "turbojpeg")]
use super::planes::Planes;
use super::rgb::{Part, Rgb8, WHITE};
use crate::error::{DataError, Result};

/// Larger pictures are refused before they are decoded (a decompression bomb must not take the memory).
pub const MAX_PIXELS: u64 = 1 << 28;

/// A decoded picture, upright, that waits for its first step.
pub(crate) enum Decoded {
    /// Its pixels.
    Rgb(Rgb8),
    /// As a JPEG stores it.
    #[cfg(feature = "turbojpeg")]
    Planes(Planes),
}

impl Decoded {
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
