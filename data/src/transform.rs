//! Augmentation as a named pipeline: `"resize:144 | random_crop:128 | flip:0.5"`.

use std::fmt;
use std::str::FromStr;

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::flaw::FlawClass;
use crate::picture::{Decoded, Part, Rgb8};
use crate::shard::{Sample, sample_image_for};

/// Steps that are applied to a picture from left to right. In a config it is a string of steps joined by `|`:
///
/// * `resize:N` scales the short side to N pixels and keeps the aspect,
/// * `center_crop:N` and `random_crop:N` cut out N x N pixels,
/// * `random_resized_crop:N,S` cuts out a random share of the area, from S to 1, with an aspect from 3/4 to 4/3, and
///   scales it to N x N (Szegedy et al. 2015, section 6),
/// * `color_jitter:X` multiplies brightness, contrast and saturation, in this order, each by a factor from 1 - X to
///   1 + X,
/// * `flip:P` mirrors left and right with probability P.
///
/// The empty string changes nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Transform(Vec<Step>);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    Resize(u32),
    CenterCrop(u32),
    RandomCrop(u32),
    RandomResizedCrop(u32, f64),
    ColorJitter(f64),
    Flip(f64),
}

impl Transform {
    /// `resize:N | center_crop:N`, in which nothing is random.
    pub fn centered(side: u32) -> Self {
        Self(vec![Step::Resize(side), Step::CenterCrop(side)])
    }

    /// Decodes a sample's picture, no larger than needed, and applies the steps.
    ///
    /// # Errors
    /// Names the sample when it has no picture, a broken one, or one that is too small for a crop.
    pub fn load(&self, sample: &Sample, rng: &mut impl Rng) -> Result<Rgb8> {
        let decoded = sample_image_for(sample, self.short_side())?;
        self.apply_to(decoded, rng).map_err(|error| sample.error(FlawClass::Unfit, error.to_string()))
    }

    /// The short side to which the first step scales every picture.
    pub(crate) fn short_side(&self) -> Option<u32> {
        match self.0.first() {
            Some(&Step::Resize(short)) => Some(short),
            _ => None,
        }
    }

    /// Applies the steps; `rng` decides crops, colours and flips.
    ///
    /// # Errors
    /// A crop that is larger than the picture at that point.
    pub fn apply(&self, picture: Rgb8, rng: &mut impl Rng) -> Result<Rgb8> {
        self.apply_to(Decoded::Rgb(picture), rng)
    }

    /// As [`Transform::apply`].
    pub(crate) fn apply_to(&self, mut decoded: Decoded, rng: &mut impl Rng) -> Result<Rgb8> {
        let mut steps = self.0.iter().peekable();
        while let Some(step) = steps.next() {
            decoded = Decoded::Rgb(match *step {
                Step::Resize(short) => {
                    let size = scaled(decoded.size(), short);
                    // What a crop right after it leaves out is not computed.
                    let crop =
                        steps.next_if(|next| matches!(next, Step::CenterCrop(_) | Step::RandomCrop(_)));
                    let part = crop.map_or(Ok(Part::whole(size)), |crop| crop.part(size, rng))?;
                    decoded.resize_part(size, part)?
                }
                Step::CenterCrop(_) | Step::RandomCrop(_) => {
                    let Part { x, y, width, height } = step.part(decoded.size(), rng)?;
                    decoded.into_rgb()?.crop(x, y, width, height)?
                }
                Step::RandomResizedCrop(n, min_share) => {
                    random_resized_crop(&decoded.into_rgb()?, n, min_share, rng)?
                }
                Step::ColorJitter(strength) => {
                    let mut picture = decoded.into_rgb()?;
                    let mut factor = || rng.random_range(1.0 - strength..=1.0 + strength) as f32;
                    let (brightness, contrast, saturation) = (factor(), factor(), factor());
                    picture.scale_colours(brightness, contrast, saturation);
                    picture
                }
                Step::Flip(probability) => {
                    let mut picture = decoded.into_rgb()?;
                    if rng.random_bool(probability) {
                        picture.flip_horizontal();
                    }
                    picture
                }
            });
        }
        decoded.into_rgb()
    }

    /// (width, height) of every result, when that does not depend on the picture: after a crop.
    pub fn output_size(&self) -> Option<(u32, u32)> {
        self.0.iter().fold(None, |size, step| match *step {
            Step::CenterCrop(n) | Step::RandomCrop(n) | Step::RandomResizedCrop(n, _) => Some((n, n)),
            Step::Resize(n) => size.map(|_| (n, n)),
            Step::ColorJitter(_) | Step::Flip(_) => size,
        })
    }
}

impl Step {
    /// What a step leaves of a picture of this size: of a crop its square, of others all.
    ///
    /// # Errors
    /// The square does not fit.
    fn part(&self, (width, height): (u32, u32), rng: &mut impl Rng) -> Result<Part> {
        let (Self::CenterCrop(n) | Self::RandomCrop(n)) = *self else {
            return Ok(Part::whole((width, height)));
        };
        let (Some(x), Some(y)) = (width.checked_sub(n), height.checked_sub(n)) else {
            let reason = format!("too small for {self} (put resize:{n} before it)");
            return Err(DataError::PictureSize { width, height, reason });
        };
        let (x, y) = match self {
            Self::RandomCrop(_) => (rng.random_range(0..=x), rng.random_range(0..=y)),
            _ => (x / 2, y / 2),
        };
        Ok(Part { x, y, width: n, height: n })
    }
}

/// The size of a picture whose short side was scaled.
fn scaled((width, height): (u32, u32), short: u32) -> (u32, u32) {
    let (width, height) = (u64::from(width), u64::from(height));
    let from = width.min(height).max(1);
    let scaled = |side: u64| u32::try_from((side * u64::from(short) + from / 2) / from).unwrap_or(u32::MAX);
    (scaled(width), scaled(height))
}

fn random_resized_crop(picture: &Rgb8, n: u32, min_share: f64, rng: &mut impl Rng) -> Result<Rgb8> {
    /// The widest and, as its inverse, the tallest aspect.
    const MAX_ASPECT: f64 = 4.0 / 3.0;
    /// Draws until a rectangle fits; then the square in the middle is taken.
    const ATTEMPTS: usize = 10;
    let area = f64::from(picture.width) * f64::from(picture.height);
    for _ in 0..ATTEMPTS {
        let cut = area * rng.random_range(min_share..=1.0);
        let aspect = rng.random_range(-MAX_ASPECT.ln()..=MAX_ASPECT.ln()).exp();
        let side = |pixels: f64| (pixels.sqrt().round() as u32).max(1);
        let (width, height) = (side(cut * aspect), side(cut / aspect));
        if width <= picture.width && height <= picture.height {
            let x = rng.random_range(0..=picture.width - width);
            let y = rng.random_range(0..=picture.height - height);
            return picture.crop(x, y, width, height)?.resize(n, n);
        }
    }
    let side = picture.width.min(picture.height);
    picture.crop((picture.width - side) / 2, (picture.height - side) / 2, side, side)?.resize(n, n)
}

impl FromStr for Transform {
    type Err = DataError;

    fn from_str(spec: &str) -> Result<Self> {
        if spec.trim().is_empty() {
            return Ok(Self::default());
        }
        spec.split('|').map(|step| step.trim().parse()).collect::<Result<_>>().map(Self)
    }
}

impl FromStr for Step {
    type Err = DataError;

    fn from_str(spec: &str) -> Result<Self> {
        /// Far above any picture that fits [`crate::picture::MAX_PIXELS`].
        const MAX_SIDE: u32 = 1 << 16;
        let fail = |reason: &str| DataError::Transform { spec: spec.to_owned(), reason: reason.to_owned() };
        let (name, value) = spec.split_once(':').unwrap_or((spec, ""));
        let side_of = |value: &str| {
            let side = value.trim().parse().ok().filter(|n| (1..=MAX_SIDE).contains(n));
            side.ok_or_else(|| fail("expected a size in pixels, such as 128"))
        };
        let share_of = |value: &str, what: &str| {
            let share = value.trim().parse().ok().filter(|p| (0.0..=1.0).contains(p));
            share.ok_or_else(|| fail(&format!("expected {what} from 0 to 1")))
        };
        let side = || side_of(value);
        match name.trim() {
            "resize" => side().map(Step::Resize),
            "center_crop" => side().map(Step::CenterCrop),
            "random_crop" => side().map(Step::RandomCrop),
            "random_resized_crop" => {
                let (side, share) = value
                    .split_once(',')
                    .ok_or_else(|| fail("expected a size and a share, such as 128,0.6"))?;
                Ok(Step::RandomResizedCrop(side_of(side)?, share_of(share, "a share of the area")?))
            }
            "color_jitter" => share_of(value, "a strength").map(Step::ColorJitter),
            "flip" => share_of(value, "a probability").map(Step::Flip),
            _ => Err(fail(
                "expected resize:N, center_crop:N, random_crop:N, random_resized_crop:N,S, color_jitter:X or flip:P",
            )),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Resize(n) => write!(f, "resize:{n}"),
            Step::CenterCrop(n) => write!(f, "center_crop:{n}"),
            Step::RandomCrop(n) => write!(f, "random_crop:{n}"),
            Step::RandomResizedCrop(n, share) => write!(f, "random_resized_crop:{n},{share}"),
            Step::ColorJitter(strength) => write!(f, "color_jitter:{strength}"),
            Step::Flip(p) => write!(f, "flip:{p}"),
        }
    }
}

impl fmt::Display for Transform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.0.iter().enumerate() {
            write!(f, "{}{step}", if i == 0 { "" } else { " | " })?;
        }
        Ok(())
    }
}

impl TryFrom<String> for Transform {
    type Error = DataError;

    fn try_from(spec: String) -> Result<Self> {
        spec.parse()
    }
}

impl From<Transform> for String {
    fn from(transform: Transform) -> Self {
        transform.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::sample_rng;
    use proptest::prelude::*;

    fn parse(spec: &str) -> Transform {
        spec.parse().unwrap()
    }

    fn apply(spec: &str, width: u32, height: u32, seed: u64) -> Result<Rgb8> {
        let pixels = (0..width * height * 3).map(|i| (i % 253) as u8).collect();
        parse(spec).apply(Rgb8 { width, height, pixels }, &mut sample_rng(seed, 0))
    }

    #[test]
    fn sizes() {
        let size = |spec, width, height| apply(spec, width, height, 1).map(|p| (p.width, p.height)).unwrap();
        assert_eq!(size("resize:72", 128, 128), (72, 72));
        assert_eq!(size("resize:10", 30, 21), (14, 10));
        assert_eq!(size("resize:144 | random_crop:128 | flip:0.5", 300, 200), (128, 128));
        assert_eq!(size("", 3, 2), (3, 2));
        assert_eq!(parse("resize:144 | random_crop:128 | flip:0.5").output_size(), Some((128, 128)));
        assert_eq!(parse("center_crop:128|resize:64").output_size(), Some((64, 64)));
        assert_eq!(size("random_resized_crop:24,0.1 | color_jitter:0.5", 40, 9), (24, 24));
        assert_eq!(parse("random_resized_crop:24,0.1 | color_jitter:0.5").output_size(), Some((24, 24)));
        assert_eq!(parse("resize:64").output_size(), None);
        assert_eq!(Transform::centered(64), parse("resize:64 | center_crop:64"));
    }

    #[test]
    fn randomness_comes_from_the_generator_alone() {
        for spec in ["random_crop:8 | flip:0.5", "random_resized_crop:8,0.5", "color_jitter:0.2"] {
            let made = |seed| apply(spec, 32, 32, seed).unwrap();
            assert_eq!(made(1), made(1), "{spec}");
            assert!((2..10).any(|seed| made(seed) != made(1)), "{spec}");
        }
        assert_eq!(apply("color_jitter:0", 4, 4, 1).unwrap(), apply("", 4, 4, 1).unwrap());
        assert_eq!(apply("flip:0", 4, 4, 1).unwrap(), apply("", 4, 4, 1).unwrap());
        assert_ne!(apply("flip:1", 4, 4, 1).unwrap(), apply("", 4, 4, 1).unwrap());
    }

    #[test]
    fn a_crop_larger_than_the_picture_is_an_error() {
        let error = apply("random_crop:128", 72, 200, 1).unwrap_err().to_string();
        assert_eq!(error, "picture of 72x200: too small for random_crop:128 (put resize:128 before it)");
    }

    #[test]
    fn bad_steps_are_named() {
        for spec in
            ["resize", "resize:0", "resize:-1", "resize:1e9", "flip:2", "flip:x", "rotate:9", "resize:8 | "]
                .into_iter()
                .chain(["random_resized_crop:8", "random_resized_crop:8,2", "color_jitter:-1"])
        {
            assert!(spec.parse::<Transform>().is_err(), "{spec}");
        }
        let error = serde_json::from_str::<Transform>("\"resize:8 | spin:3\"").unwrap_err().to_string();
        assert!(error.starts_with("transform \"spin:3\": expected resize:N"), "{error}");
    }

    proptest! {
        #[test]
        fn text_round_trip(sizes in proptest::collection::vec((0u8..6, 1u32..500, 0.0f64..=1.0), 0..5)) {
            let step = |(kind, n, p)| {
                let all = [
                    Step::Resize(n),
                    Step::CenterCrop(n),
                    Step::RandomCrop(n),
                    Step::RandomResizedCrop(n, p),
                    Step::ColorJitter(p),
                    Step::Flip(p),
                ];
                all[usize::from(kind)]
            };
            let transform = Transform(sizes.into_iter().map(step).collect());
            prop_assert_eq!(parse(&transform.to_string()), transform);
        }

        #[test]
        fn a_crop_after_scaling_is_a_part_of_the_whole(
            (width, height, short) in (1u32..80, 1u32..80, 1u32..50),
            share in 0.01f64..=1.0,
            seed in any::<u64>(),
        ) {
            let side = (f64::from(short) * share).ceil() as u32;
            let fused = apply(&format!("resize:{short} | random_crop:{side}"), width, height, seed).unwrap();
            let whole = apply(&format!("resize:{short}"), width, height, seed).unwrap();
            let crop = parse(&format!("random_crop:{side}"));
            let two_steps = crop.apply(whole, &mut sample_rng(seed, 0)).unwrap();
            prop_assert_eq!((fused.width, fused.height), (two_steps.width, two_steps.height));
            let differences = fused.pixels.iter().zip(&two_steps.pixels).map(|(a, b)| a.abs_diff(*b));
            // Columns and rows are scaled one after the other, and both results are rounded to bytes.
            prop_assert!(differences.max() <= Some(2));
        }

        #[test]
        fn any_text_is_survived(spec in ".{0,40}") {
            if let Ok(transform) = spec.parse::<Transform>() {
                prop_assert_eq!(parse(&transform.to_string()), transform);
            }
        }
    }
}
