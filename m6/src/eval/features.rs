//! The spaces in which pictures are compared.

use m6_data::Rgb8;
use m6_vqgan::{Vqgan, pictures_to_tensor, to_unit};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// Places a side of the pooled latents: enough to tell where things are, few enough to forgive small shifts.
const LATENT_GRID: i64 = 8;
/// Side of the pictures whose pixels are compared.
const PIXEL_SIDE: u32 = 32;
/// Keeps a latent of zeros from dividing by zero.
const EPS: f64 = 1e-8;

/// A space of features whose Euclidean distance says how alike two pictures are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum FeatureSpace {
    /// What the image tokenizer's encoder gives before quantisation, averaged over an 8 x 8 grid, flattened and scaled
    /// to length 1. The distance runs from 0 to 2 and ranks as the cosine does. Not a learned notion of content, but
    /// sensitive to shape, place and colour, and the same for every model on this tokenizer.
    #[serde(rename = "tokenizer-latent-8x8")]
    Latent,
    /// RGB pixels at 32 x 32, scaled so that the distance is the root mean square difference in bytes (0 to 255).
    #[serde(rename = "pixels-32x32")]
    Pixels,
}

impl FeatureSpace {
    /// All spaces.
    pub const ALL: [Self; 2] = [Self::Latent, Self::Pixels];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Latent => "tokenizer-latent-8x8",
            Self::Pixels => "pixels-32x32",
        }
    }

    /// Features `[n, dimensions]`, float32 on the CPU, of pictures scaled to a square.
    ///
    /// # Errors
    /// When there is no picture.
    pub fn features(self, vqgan: &Vqgan, pictures: &[Rgb8]) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let side = match self {
            Self::Latent => vqgan.config().resolution as u32,
            Self::Pixels => PIXEL_SIDE,
        };
        let resized = pictures.iter().map(|p| p.resize(side, side)).collect::<m6_data::Result<Vec<_>>>()?;
        let bytes = pictures_to_tensor(&resized)?;
        Ok(match self {
            Self::Latent => {
                let latent = vqgan.encode_latent(&to_unit(&bytes, vqgan.device())?)?.to_device(Device::Cpu);
                let flat = latent.adaptive_avg_pool2d([LATENT_GRID, LATENT_GRID]).flatten(1, -1);
                &flat / flat.norm_scalaropt_dim(2.0, [1], true).clamp_min(EPS)
            }
            Self::Pixels => {
                let flat = bytes.to_kind(Kind::Float).flatten(1, -1);
                let dimensions = flat.size()[1] as f64;
                flat / dimensions.sqrt()
            }
        })
    }
}

/// Euclidean distances `[n, m]` between the rows of `a` `[n, d]` and `b` `[m, d]`.
pub(super) fn distances(a: &Tensor, b: &Tensor) -> Tensor {
    /// libtorch's way through matrix products loses small distances to rounding.
    const WITHOUT_PRODUCTS: i64 = 2;
    Tensor::cdist(a, b, 2.0, WITHOUT_PRODUCTS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::testing::{picture, tiny_model};

    fn distance(space: FeatureSpace, a: &Rgb8, b: &Rgb8) -> f64 {
        let features = space.features(&tiny_model().vqgan, &[a.clone(), b.clone()]).unwrap();
        distances(&features, &features).double_value(&[0, 1])
    }

    #[test]
    fn pixel_distance_is_the_root_mean_square_difference() {
        let grey = |level| Rgb8::filled(16, 16, [level; 3]);
        assert!((distance(FeatureSpace::Pixels, &grey(10), &grey(50)) - 40.0).abs() < 1e-3);
        // One channel of three differs by 30: sqrt(900 / 3).
        let red =
            distance(FeatureSpace::Pixels, &Rgb8::filled(9, 5, [30, 0, 0]), &Rgb8::filled(9, 5, [0; 3]));
        assert!((red - 300f64.sqrt()).abs() < 1e-3);
    }

    #[test]
    fn latents_have_length_one_and_tell_pictures_apart() {
        let features = FeatureSpace::Latent.features(&tiny_model().vqgan, &[picture(1), picture(2)]).unwrap();
        let norms = features.square().sum_dim_intlist([1].as_slice(), false, Kind::Float);
        assert!((norms - 1.0).abs().max().double_value(&[]) < 1e-5);
        assert!(distance(FeatureSpace::Latent, &picture(1), &picture(1)) < 1e-6);
        assert!(distance(FeatureSpace::Latent, &picture(1), &picture(2)) > 1e-3);
    }
}
