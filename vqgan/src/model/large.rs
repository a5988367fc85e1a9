//! Pictures whose feature maps do not fit in memory: the outer levels in tiles, the inner ones on the whole grid. Nothing
//! is approximated, so there are no seams.

use m6_runtime::fused::channels_last;
use tch::{Kind, Tensor};

use super::Vqgan;
use crate::error::Result;
use crate::pictures::to_unit;
use crate::tiles::{Area, TiledLevel};

/// Positions whose distances to all codes are held at once.
const ROWS_AT_ONCE: i64 = 1 << 14;

/// Which levels are cut in tiles, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiling {
    /// A level with larger feature maps is cut, unless it has attention.
    pub(crate) map_bytes: i64,
    /// Side of a tile on the feature maps of its level; even.
    pub(crate) side: i64,
}

impl Tiling {
    /// A level of the whole grid has some five maps at a time, and a tile a margin of some ten positions.
    pub(crate) const DEFAULT: Self = Self { map_bytes: 1 << 28, side: 256 };
}

impl Vqgan {
    /// What [`Vqgan::encode`] gives for one picture, as bytes `[1, 3, h, w]` on the CPU whose sides are multiples of the
    /// downsampling factor. After each tile `advance` gets the number of all.
    pub(crate) fn encode_large(
        &self,
        bytes: &Tensor,
        tiling: Tiling,
        advance: &mut dyn FnMut(u64),
    ) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let rows = self.rows(&self.latent_large(bytes, tiling, advance)?);
        let codes =
            rows.split(ROWS_AT_ONCE, 0).iter().map(|rows| self.quantizer.choose(rows)).collect::<Vec<_>>();
        Ok(Tensor::cat(&codes, 0).unsqueeze(0))
    }

    fn latent_large(&self, bytes: &Tensor, tiling: Tiling, advance: &mut dyn FnMut(u64)) -> Result<Tensor> {
        let [.., height, width] = bytes.size()[..] else { unreachable!("pictures have four axes") };
        let picture = Area::whole(height, width);
        let levels = self.tiled_levels(picture, tiling, self.config.num_res_blocks);
        let runs = levels.iter().map(TiledLevel::runs).sum();
        let mut map = None;
        let read = |area: Area, map: &Option<Tensor>| match map {
            None => Ok(channels_last(&to_unit(&area.of(bytes), self.device())?.to_kind(self.compute))),
            Some(map) => Ok(channels_last(&area.of(map))),
        };
        for (index, level) in levels.iter().enumerate() {
            let inner = self.empty_map(index, level.map.halved());
            level.compute(
                |area| read(area, &map),
                |x, norms| self.encoder.level(index, x, norms),
                |tile, y| tile.own.halved().of(&inner).copy_(&tile.inside.halved().of(y)),
                || advance(runs),
            )?;
            map = Some(inner);
        }
        let map = match map {
            None => read(picture, &None)?,
            Some(map) => channels_last(&map),
        };
        Ok(self.quant_conv.forward(&self.encoder.forward_from(levels.len(), map)).to_kind(Kind::Float))
    }

    /// What [`Vqgan::decode_codes`] gives for the codes `[1, grid_h * grid_w]` of one picture, before it is clamped: `write`
    /// takes areas of the picture and their pixels. After each tile `advance` gets the number of all.
    ///
    /// # Errors
    /// As for [`Vqgan::decode_codes`].
    pub(crate) fn decode_large(
        &self,
        codes: &Tensor,
        (grid_h, grid_w): (i64, i64),
        tiling: Tiling,
        advance: &mut dyn FnMut(u64),
        mut write: impl FnMut(Area, &Tensor),
    ) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let grid = self.checked_grid(codes, grid_h, grid_w)?;
        let factor = self.config.downsample();
        let picture = Area::whole(grid_h * factor, grid_w * factor);
        let mut levels = self.tiled_levels(picture, tiling, self.config.num_res_blocks + 1);
        let mut map = self.decoder.forward_to(levels.len(), &self.decoder_input(&grid));
        let Some(outermost) = levels.first_mut() else {
            write(picture, &map);
            return Ok(());
        };
        // That of the way out.
        outermost.norms += 1;
        let runs = levels.iter().map(TiledLevel::runs).sum();
        for (index, level) in levels.iter().enumerate().rev() {
            let outer = (index > 0).then(|| self.empty_map(index, level.map));
            level.compute(
                |area| Ok(channels_last(&area.halved().of(&map))),
                |x, norms| self.decoder.level(index, x, norms),
                |tile, y| match &outer {
                    Some(outer) => tile.own.of(outer).copy_(&tile.inside.of(y)),
                    None => write(tile.own, &tile.inside.of(y)),
                },
                || advance(runs),
            )?;
            map = outer.unwrap_or(map);
        }
        Ok(())
    }

    /// The levels of `blocks` residual blocks that are cut for a picture of such sides, outermost first. The innermost is
    /// never.
    fn tiled_levels(&self, picture: Area, tiling: Tiling, blocks: i64) -> Vec<TiledLevel> {
        let config = &self.config;
        let is_cut = |&(level, map): &(usize, Area)| {
            // The next level's channels come with the doubling of the sides.
            let channels = config.width(level).max(config.width(level + 1));
            let bytes = map.height * map.width * channels * self.compute.elt_size_in_bytes() as i64;
            bytes > tiling.map_bytes && !config.has_attention(level)
        };
        let maps = std::iter::successors(Some(picture), |map| Some(map.halved()));
        let cut = (0..config.ch_mult.len() - 1).zip(maps).take_while(is_cut);
        // Two convolutions and norms a block, and a convolution before and one after them.
        let level = |(_, map)| TiledLevel {
            map,
            side: tiling.side,
            margin: 2 * blocks + 2,
            norms: 2 * blocks as u64,
        };
        cut.map(level).collect()
    }

    /// A feature map of level `level`, to be filled.
    fn empty_map(&self, level: usize, area: Area) -> Tensor {
        let shape = [1, self.config.width(level), area.height, area.width];
        Tensor::empty(shape, (self.compute, self.device()))
    }
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init, Params};
    use tch::Device;

    use super::*;
    use crate::config::VqganConfig;
    use crate::config::tests::tiny;

    const WHOLE: Tiling = Tiling { map_bytes: i64::MAX, side: 256 };

    /// Two and three levels, with attention on the innermost, in the middle and nowhere, and one that is cut at a level of
    /// three only.
    fn configs() -> [VqganConfig; 4] {
        let three = VqganConfig { ch_mult: vec![1, 2, 2], num_res_blocks: 2, ..tiny() };
        [
            tiny(),
            VqganConfig { attn_resolutions: vec![4], ..three.clone() },
            VqganConfig { attn_resolutions: vec![], mid_attention: false, ..three.clone() },
            VqganConfig { attn_resolutions: vec![8], ..three },
        ]
    }

    /// All norms have weights and biases of their own.
    fn model(config: &VqganConfig) -> Vqgan {
        let params = Params::new(Device::Cpu, 1);
        let model = Vqgan::new(&params, config);
        let _guard = tch::no_grad_guard();
        for (_, parameter) in params.entries().iter().filter(|(name, _)| name.contains("norm")) {
            let mut tensor = parameter.tensor.shallow_clone();
            tensor += Tensor::randn_like(&tensor) * 0.3;
        }
        model
    }

    fn largest(x: Tensor) -> f64 {
        x.abs().max().double_value(&[])
    }

    fn bytes(height: i64, width: i64) -> Tensor {
        let noise =
            Params::new(Device::Cpu, 9).add("x", &[1, 3, height, width], Init::Uniform(1.0), Group::Buffer);
        // Brighter to the right, so that tiles differ in their moments.
        let slope = Tensor::linspace(0.0, 180.0, width, (Kind::Float, Device::Cpu));
        ((noise + 1.0) * 35.0 + slope).to_kind(Kind::Uint8)
    }

    fn decoded(model: &Vqgan, codes: &Tensor, grid: (i64, i64), tiling: Tiling) -> (Tensor, u64) {
        let factor = model.config.downsample();
        let picture =
            Tensor::full([1, 3, grid.0 * factor, grid.1 * factor], f64::NAN, (Kind::Float, Device::Cpu));
        let mut runs = 0;
        let write = |area: Area, pixels: &Tensor| area.of(&picture).copy_(pixels);
        model.decode_large(codes, grid, tiling, &mut |_| runs += 1, write).unwrap();
        (picture, runs)
    }

    #[test]
    fn tiles_make_what_the_whole_makes() {
        for config in configs() {
            let model = model(&config);
            let factor = config.downsample();
            for (grid, sides) in [((7, 11), [10, 64]), ((9, 5), [8, 12]), ((1, 9), [2, 6])] {
                let bytes = bytes(grid.0 * factor, grid.1 * factor);
                let latent = model.encode_latent(&to_unit(&bytes, Device::Cpu).unwrap()).unwrap();
                let codes = model.encode(&to_unit(&bytes, Device::Cpu).unwrap()).unwrap();
                let picture = model.decode_codes(&codes, grid.0, grid.1).unwrap();
                for side in sides {
                    let tiling = Tiling { map_bytes: 0, side };
                    let (mut runs, mut all) = (0, 0);
                    let mut count = |total| (runs, all) = (runs + 1, total);
                    let gap = largest(model.latent_large(&bytes, tiling, &mut count).unwrap() - &latent);
                    assert!(gap < 1e-4, "{config:?}, {grid:?}, {side}: {gap}");
                    assert!(runs > 0 && runs == all, "{runs} of {all}");
                    assert_eq!(model.encode_large(&bytes, tiling, &mut |_| ()).unwrap(), codes);
                    let (tiled, runs) = decoded(&model, &codes, grid, tiling);
                    let gap = largest(tiled.clamp(-1.0, 1.0) - &picture);
                    assert!(gap < 1e-4 && runs > 0, "{config:?}, {grid:?}, {side}: {gap}");
                }
            }
        }
    }

    #[test]
    fn a_picture_that_fits_is_not_cut_and_has_the_same_digits() {
        let model = model(&configs()[1]);
        let bytes = bytes(24, 36);
        let x = to_unit(&bytes, Device::Cpu).unwrap();
        let never = &mut |_| panic!("a tile");
        assert_eq!(model.latent_large(&bytes, WHOLE, never).unwrap(), model.encode_latent(&x).unwrap());
        let codes = model.encode(&x).unwrap();
        assert_eq!(model.encode_large(&bytes, Tiling::DEFAULT, never).unwrap(), codes);
        let (picture, runs) = decoded(&model, &codes, (6, 9), WHOLE);
        assert_eq!((picture.clamp(-1.0, 1.0), runs), (model.decode_codes(&codes, 6, 9).unwrap(), 0));
    }

    #[test]
    fn levels_are_cut_by_the_bytes_of_their_maps_and_never_with_attention() {
        let count = |config: &VqganConfig, map_bytes| {
            let tiling = Tiling { map_bytes, side: 4 };
            model(config).tiled_levels(Area::whole(16, 32), tiling, 1).len()
        };
        let [_, inner, without, middle] = configs();
        // 64 channels in float32: the second level's come with the doubling to the first.
        let outermost = 16 * 32 * 64 * 4;
        assert_eq!([outermost, outermost - 1].map(|bytes| count(&inner, bytes)), [0, 1]);
        assert_eq!([outermost / 4, outermost / 4 - 1].map(|bytes| count(&inner, bytes)), [1, 2]);
        assert_eq!([&inner, &without, &middle].map(|config| count(config, 0)), [2, 2, 1]);
    }
}
