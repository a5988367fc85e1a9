//! Differentiable augmentation of what the discriminator sees (DiffAugment, Zhao et al. 2020), which keeps it from
//! learning a small data set by heart.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// Shift along each side, as a part of it.
const SHIFT: f64 = 0.125;
/// Sides of the square that is cut out in one of the picture.
const HOLES_A_SIDE: i64 = 2;
/// Axes of a picture batch along which it is moved and cut.
const SIDES: [i64; 2] = [2, 3];

/// The kinds of change that are made, all of them unless the config says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AugmentConfig {
    /// Of brightness, saturation and contrast.
    pub colour: bool,
    /// Of place, by up to an eighth of a side.
    pub translation: bool,
    /// A square of half the side is hidden.
    pub cutout: bool,
}

impl Default for AugmentConfig {
    fn default() -> Self {
        Self { colour: true, translation: true, cutout: true }
    }
}

/// One random change of colour, place and visible part for each picture of a batch. The same draw can be applied to
/// several batches, so that originals and reconstructions stay comparable.
#[derive(Debug)]
pub(crate) struct Augmentation {
    config: AugmentConfig,
    /// Added; within 0.5.
    brightness: Tensor,
    /// Factor on the distance to grey, 0 to 2.
    saturation: Tensor,
    /// Factor on the distance to the mean colour, 0.5 to 1.5.
    contrast: Tensor,
    /// Pixels by which a picture is moved, for each of [`SIDES`].
    shift: [Tensor; 2],
    /// Middle of the square that is cut out, for each of [`SIDES`]: up to half of it lies outside.
    hole: [Tensor; 2],
}

impl Augmentation {
    /// Draws for a batch of shape `[b, 3, h, w]` on `device`, without waiting for it.
    pub(crate) fn draw(config: AugmentConfig, shape: &[i64], device: Device) -> Self {
        let one_each = [shape[0], 1, 1, 1];
        let uniform = || Tensor::rand(one_each, (Kind::Float, device));
        let integers =
            |low: i64, high: i64| Tensor::randint_low(low, high + 1, one_each, (Kind::Int64, device));
        let side = |dim: i64| shape[dim as usize];
        Self {
            config,
            brightness: uniform() - 0.5,
            saturation: uniform() * 2.0,
            contrast: uniform() + 0.5,
            shift: SIDES.map(|dim| {
                let limit = (side(dim) as f64 * SHIFT).round() as i64;
                integers(-limit, limit)
            }),
            // The middle of an even number of pixels lies between two of them, or on a border of the picture.
            hole: SIDES.map(|dim| integers(0, side(dim) - hole_side(side(dim)) % 2)),
        }
    }

    /// Changes pictures `[b, 3, h, w]`, float32; what comes in from outside or is cut out is 0.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let AugmentConfig { colour, translation, cutout } = self.config;
        let mut x = if colour { self.recolour(x) } else { x.shallow_clone() };
        if translation {
            for (dim, shift) in SIDES.into_iter().zip(&self.shift) {
                x = translate(&x, dim, shift);
            }
        }
        if cutout { self.cut_out(&x) } else { x }
    }

    fn recolour(&self, x: &Tensor) -> Tensor {
        let x = x + &self.brightness;
        let grey = x.mean_dim([1].as_slice(), true, Kind::Float);
        let x = (x - &grey) * &self.saturation + grey;
        let mean = x.mean_dim([1, 2, 3].as_slice(), true, Kind::Float);
        (x - &mean) * &self.contrast + mean
    }

    fn cut_out(&self, x: &Tensor) -> Tensor {
        let hidden = |index: usize| {
            let dim = SIDES[index];
            let side = hole_side(x.size()[dim as usize]);
            let within = positions(x, dim) - &self.hole[index] + side / 2;
            within.ge(0).logical_and(&within.lt(side))
        };
        x * hidden(0).logical_and(&hidden(1)).logical_not().to_kind(x.kind())
    }
}

/// Pixels that are cut out along a side of `side`.
fn hole_side(side: i64) -> i64 {
    side / HOLES_A_SIDE
}

/// Moves each picture along axis `dim` by its number of pixels.
fn translate(x: &Tensor, dim: i64, shift: &Tensor) -> Tensor {
    let (size, side) = (x.size(), x.size()[dim as usize]);
    let source = positions(x, dim) + shift;
    let inside = source.ge(0).logical_and(&source.lt(side)).to_kind(x.kind());
    x.gather(dim, &source.clamp(0, side - 1).expand(&size, false), false) * inside
}

/// 0, 1, 2, ... along axis `dim` of a tensor of four axes.
fn positions(x: &Tensor, dim: i64) -> Tensor {
    let mut shape = [1; 4];
    shape[dim as usize] = -1;
    Tensor::arange(x.size()[dim as usize], (Kind::Int64, x.device())).view(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn a_translated_picture_keeps_its_order_and_is_filled_with_zeros() {
        let x = Tensor::arange_start(1, 9, FLOAT).view([1, 1, 1, 8]).expand([3, 3, 2, 8], false);
        let moved = translate(&x, 3, &Tensor::from_slice(&[-2i64, 0, 3]).view([3, 1, 1, 1]));
        let row = |picture| Vec::<f32>::try_from(moved.get(picture).get(2).get(1)).unwrap();
        assert_eq!(row(0), [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(row(1), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(row(2), [4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn draws_are_in_range_and_a_square_is_cut_out() {
        let shape = [64, 3, 16, 16];
        let drawn = Augmentation::draw(AugmentConfig::default(), &shape, Device::Cpu);
        let bounds = |t: &Tensor| (t.min().double_value(&[]), t.max().double_value(&[]));
        assert_eq!(bounds(&drawn.shift[0]), (-2.0, 2.0));
        let (low, high) = bounds(&drawn.contrast);
        assert!((0.5..0.7).contains(&low) && (1.3..1.5).contains(&high));
        let many = Augmentation::draw(AugmentConfig::default(), &[2048, 3, 16, 18], Device::Cpu);
        assert_eq!(many.hole.each_ref().map(bounds), [(0.0, 16.0), (0.0, 17.0)]);
        let cut = drawn.cut_out(&Tensor::ones(shape, FLOAT));
        let hidden = 256.0 - cut.select(1, 0).sum_dim_intlist([1, 2].as_slice(), false, Kind::Float);
        // Of 8 x 8 pixels a corner leaves 4 x 4 inside.
        let (low, high) = bounds(&hidden);
        assert!(low >= 16.0 && high == 64.0, "{low} {high}");
    }

    /// As in the authors' code: `side / 2` pixels from `middle - side / 4` on, as far as they are inside.
    #[test]
    fn the_hole_is_half_a_side_around_its_middle() {
        for (side, middle, hidden) in [(8, 4, 2..6), (8, 0, 0..2), (8, 8, 6..8), (6, 2, 1..4), (6, 5, 4..6)] {
            let shape = [1, 3, side, side];
            let mut drawn = Augmentation::draw(AugmentConfig::default(), &shape, Device::Cpu);
            drawn.hole = SIDES.map(|_| Tensor::full([1, 1, 1, 1], middle, (Kind::Int64, Device::Cpu)));
            let expected = Tensor::ones(shape, FLOAT);
            let hole = |dim, x: &Tensor| x.narrow(dim, hidden.start, hidden.end - hidden.start);
            let _ = hole(3, &hole(2, &expected)).zero_();
            assert_eq!(drawn.cut_out(&Tensor::ones(shape, FLOAT)), expected, "{side}, {middle}");
        }
    }

    #[test]
    fn one_draw_changes_equal_pictures_alike_and_gradients_pass() {
        let x = Tensor::linspace(-1, 1, 2 * 3 * 16 * 16, FLOAT).view([2, 3, 16, 16]).set_requires_grad(true);
        let drawn = Augmentation::draw(AugmentConfig::default(), &x.size(), Device::Cpu);
        assert_eq!(drawn.apply(&x), drawn.apply(&x.copy()));
        drawn.apply(&x).square().sum(Kind::Float).backward();
        assert!(x.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    }

    #[test]
    fn changes_can_be_left_out() {
        let x = Tensor::linspace(-1, 1, 2 * 3 * 16 * 16, FLOAT).view([2, 3, 16, 16]);
        let mut drawn = Augmentation::draw(AugmentConfig::default(), &x.size(), Device::Cpu);
        drawn.shift = SIDES.map(|_| Tensor::ones([2, 1, 1, 1], (Kind::Int64, Device::Cpu)));
        let mut apply = |table: &str| {
            drawn.config = toml::from_str(table).unwrap();
            drawn.apply(&x)
        };
        assert_eq!(apply("colour = false\ntranslation = false\ncutout = false"), x);
        let cut = apply("colour = false\ntranslation = false");
        // It leaves the values that it shows; what it hides is 0.
        assert_eq!((&cut - &x) * &cut, x.zeros_like());
        assert!(cut.eq(0.0).sum(Kind::Int64).int64_value(&[]) >= 2 * 3 * 16);
        let moved = apply("colour = false\ncutout = false");
        let (inner, source) = (moved.narrow(2, 0, 15).narrow(3, 0, 15), x.narrow(2, 1, 15).narrow(3, 1, 15));
        assert_eq!(inner, source);
        assert_eq!(apply("translation = false\ncutout = false") * cut.ne(0.0), apply("translation = false"));
    }
}
