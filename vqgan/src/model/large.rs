//! Pictures whose feature maps do not fit in memory: the outer levels in tiles, the inner ones on the whole grid. Nothing
//! is approximated, so there are no seams.
//!
//! A map between two levels in tiles is held whole, or else both are one unit that computes it anew in every pass. Of all
//! ways to hold some of them the one of least work is taken whose maps fit a budget.

use m6_runtime::device::release_freed_memory;
use m6_runtime::fused::channels_last;
use tch::{Kind, Tensor};

use super::Vqgan;
use crate::error::Result;
use crate::pictures::to_unit;
use crate::tiles::{Area, Half, TiledLevel, Unit};

/// Positions whose distances to all codes are held at once.
const ROWS_AT_ONCE: i64 = 1 << 14;

/// Operations of a 3x3 convolution a position, from one channel to one: a product and a sum for each weight.
const CONVOLUTION_WORK: i64 = 2 * 9;

/// Which levels are cut in tiles, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiling {
    /// A level with larger feature maps is cut, unless it has attention.
    pub(crate) map_bytes: i64,
    /// What maps between levels may take, that which is read and that which is made.
    pub(crate) held_bytes: i64,
    /// Side of a tile on the outermost map of its unit, a multiple of two to the number of levels.
    pub(crate) side: i64,
}

impl Tiling {
    /// For 2 GB in all: a level of the whole grid has some five maps at a time, and a tile a margin of some ten positions.
    pub(crate) const DEFAULT: Self = Self { map_bytes: 1 << 28, held_bytes: 5 << 28, side: 256 };
}

impl Vqgan {
    /// What [`Vqgan::encode`] gives for one picture, as bytes `[1, 3, h, w]` on the CPU whose sides are multiples of the
    /// downsampling factor. After each tile `advance` gets its operations and those of all tiles.
    pub(crate) fn encode_large(
        &self,
        bytes: &Tensor,
        tiling: Tiling,
        advance: &mut dyn FnMut(u64, u64),
    ) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let rows = self.rows(&self.latent_large(bytes, tiling, advance)?);
        let codes =
            rows.split(ROWS_AT_ONCE, 0).iter().map(|rows| self.quantizer.choose(rows)).collect::<Vec<_>>();
        Ok(Tensor::cat(&codes, 0).unsqueeze(0))
    }

    fn latent_large(
        &self,
        bytes: &Tensor,
        tiling: Tiling,
        advance: &mut dyn FnMut(u64, u64),
    ) -> Result<Tensor> {
        let [.., height, width] = bytes.size()[..] else { unreachable!("pictures have four axes") };
        let picture = Area::whole(height, width);
        let Plan { levels, units } = self.plan(Half::Encoder, picture, tiling);
        let work = units.iter().map(Unit::work).sum();
        let mut map = None;
        let read = |area: Area, map: &Option<Tensor>| match map {
            None => Ok(channels_last(&to_unit(&area.of(bytes), self.device())?.to_kind(self.compute))),
            Some(map) => Ok(channels_last(&area.of(map))),
        };
        for unit in &units {
            let inner = self.empty_map(unit.innermost.index, unit.innermost.map.halved());
            unit.compute(
                |area| read(area, &map),
                |level, x, norms| self.encoder.level(level, x, norms),
                |tile, y| tile.own.of(&inner).copy_(&tile.inside.of(y)),
                |operations| advance(operations, work),
            )?;
            map = Some(inner);
            release_freed_memory();
        }
        let map = match map {
            None => read(picture, &None)?,
            Some(map) => channels_last(&map),
        };
        Ok(self.quant_conv.forward(&self.encoder.forward_from(levels, map)).to_kind(Kind::Float))
    }

    /// What [`Vqgan::decode_codes`] gives for the codes `[1, grid_h * grid_w]` of one picture, before it is clamped: `write`
    /// takes areas of the picture and their pixels. After each tile `advance` gets its operations and those of all tiles.
    ///
    /// # Errors
    /// As for [`Vqgan::decode_codes`].
    pub(crate) fn decode_large(
        &self,
        codes: &Tensor,
        (grid_h, grid_w): (i64, i64),
        tiling: Tiling,
        advance: &mut dyn FnMut(u64, u64),
        mut write: impl FnMut(Area, &Tensor),
    ) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let grid = self.checked_grid(codes, grid_h, grid_w)?;
        let factor = self.config.downsample();
        let picture = Area::whole(grid_h * factor, grid_w * factor);
        let Plan { levels, units } = self.plan(Half::Decoder, picture, tiling);
        let mut map = self.decoder.forward_to(levels, &self.decoder_input(&grid));
        if levels == 0 {
            write(picture, &map);
            return Ok(());
        }
        release_freed_memory();
        let work = units.iter().map(Unit::work).sum();
        for unit in units.iter().rev() {
            let TiledLevel { index, map: area, .. } = unit.outermost;
            let outer = (index > 0).then(|| self.empty_map(index, area));
            unit.compute(
                |area| Ok(channels_last(&area.of(&map))),
                |level, x, norms| self.decoder.level(level, x, norms),
                |tile, y| match &outer {
                    Some(outer) => tile.own.of(outer).copy_(&tile.inside.of(y)),
                    None => write(tile.own, &tile.inside.of(y)),
                },
                |operations| advance(operations, work),
            )?;
            map = outer.unwrap_or(map);
            release_freed_memory();
        }
        Ok(())
    }

    /// How the outer levels of `half` are computed for a picture of such sides.
    fn plan(&self, half: Half, picture: Area, tiling: Tiling) -> Plan {
        let levels = self.tiled_levels(half, picture, tiling.map_bytes);
        // A bit for each map between two of them: whether it is held.
        let ways = 0..1u32 << levels.len().saturating_sub(1);
        let units = |held: u32| {
            let chunks = levels.chunk_by(move |outer, _| held >> outer.index & 1 == 0);
            chunks.map(|levels| Unit::new(half, levels, tiling.side)).collect::<Vec<_>>()
        };
        let cost = |units: &Vec<Unit>| {
            let inner_bytes = units.iter().map(|unit| unit.innermost.inner_bytes);
            let outer_bytes = std::iter::once(0).chain(inner_bytes.clone());
            let held = inner_bytes.zip(outer_bytes).map(|(inner, outer)| inner + outer).max();
            (held.max(Some(tiling.held_bytes)), units.iter().map(Unit::work).sum::<u64>())
        };
        let units = ways.map(units).min_by_key(cost).unwrap_or_default();
        Plan { levels: levels.len(), units }
    }

    /// The levels that are cut for a picture of such sides, outermost first. The innermost is never.
    fn tiled_levels(&self, half: Half, picture: Area, map_bytes: i64) -> Vec<TiledLevel> {
        let config = &self.config;
        let bytes =
            |map: Area, channels: i64| map.positions() * channels * self.compute.elt_size_in_bytes() as i64;
        let is_cut = |&(level, map): &(usize, Area)| {
            // The next level's channels come with the doubling of the sides.
            let channels = config.width(level).max(config.width(level + 1));
            bytes(map, channels) > map_bytes && !config.has_attention(level)
        };
        let maps = std::iter::successors(Some(picture), |map| Some(map.halved()));
        let cut = (0..config.ch_mult.len() - 1).zip(maps).take_while(is_cut);
        let level = |(index, map): (usize, Area)| {
            let (width, inner) = (config.width(index), config.width(index + 1));
            let (blocks, norms_after, work_before, between) = match half {
                Half::Encoder => (config.num_res_blocks, 0, 0, width),
                Half::Decoder => (config.num_res_blocks + 1, usize::from(index == 0), inner * inner, inner),
            };
            let norm_work = CONVOLUTION_WORK * width * width;
            // Two convolutions and norms a block, and a convolution before and one after them.
            TiledLevel {
                index,
                map,
                reach: 2 * blocks + 2,
                norms: 2 * blocks as usize + norms_after,
                // Reading a tile and gathering its moments takes about as long as half a convolution.
                first_work: CONVOLUTION_WORK * work_before + norm_work / 2,
                norm_work,
                inner_bytes: bytes(map.halved(), between),
            }
        };
        cut.map(level).collect()
    }

    /// A feature map of level `level`, to be filled.
    fn empty_map(&self, level: usize, area: Area) -> Tensor {
        let shape = [1, self.config.width(level), area.height, area.width];
        Tensor::empty(shape, (self.compute, self.device()))
    }
}

/// Levels in tiles, and the units in which they are computed, outermost first.
#[derive(Debug)]
struct Plan {
    levels: usize,
    units: Vec<Unit>,
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init, Params};
    use tch::Device;

    use super::*;
    use crate::config::VqganConfig;
    use crate::config::tests::tiny;

    const WHOLE: Tiling = Tiling { map_bytes: i64::MAX, ..Tiling::DEFAULT };

    /// Two and three levels, with attention on the innermost, in the middle and nowhere, and one that is cut at a level of
    /// three only.
    fn configs() -> [VqganConfig; 4] {
        let three = VqganConfig { ch_mult: vec![1, 2, 2], ..tiny() };
        [
            tiny(),
            VqganConfig { attn_resolutions: vec![4], ..three.clone() },
            VqganConfig { attn_resolutions: vec![], mid_attention: false, ..three.clone() },
            VqganConfig { attn_resolutions: vec![8], num_res_blocks: 2, ..three },
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

    fn decoded(model: &Vqgan, codes: &Tensor, grid: (i64, i64), tiling: Tiling) -> (Tensor, Work) {
        let factor = model.config.downsample();
        let picture =
            Tensor::full([1, 3, grid.0 * factor, grid.1 * factor], f64::NAN, (Kind::Float, Device::Cpu));
        let mut work = Work::default();
        let write = |area: Area, pixels: &Tensor| area.of(&picture).copy_(pixels);
        model.decode_large(codes, grid, tiling, &mut |tile, all| work.add(tile, all), write).unwrap();
        (picture, work)
    }

    /// Operations that were told of.
    #[derive(Debug, Default, PartialEq)]
    struct Work {
        done: u64,
        all: u64,
    }

    impl Work {
        fn add(&mut self, tile: u64, all: u64) {
            *self = Self { done: self.done + tile, all };
        }

        fn is_done(&self) -> bool {
            self.done > 0 && self.done == self.all
        }
    }

    #[test]
    fn tiles_make_what_the_whole_makes() {
        for config in configs() {
            let model = model(&config);
            let factor = config.downsample();
            // All maps between levels are held, or none.
            let [all, none] = [i64::MAX, 0];
            for (grid, tilings) in [
                ((7, 11), [(12, none), (64, all)]),
                ((9, 5), [(8, all), (20, none)]),
                ((1, 9), [(4, all), (8, none)]),
            ] {
                let bytes = bytes(grid.0 * factor, grid.1 * factor);
                let latent = model.encode_latent(&to_unit(&bytes, Device::Cpu).unwrap()).unwrap();
                let codes = model.encode(&to_unit(&bytes, Device::Cpu).unwrap()).unwrap();
                let picture = model.decode_codes(&codes, grid.0, grid.1).unwrap();
                for (side, held_bytes) in tilings {
                    let tiling = Tiling { map_bytes: 0, held_bytes, side };
                    let mut work = Work::default();
                    let mut add = |tile, all| work.add(tile, all);
                    let gap = largest(model.latent_large(&bytes, tiling, &mut add).unwrap() - &latent);
                    assert!(gap < 1e-4, "{config:?}, {grid:?}, {tiling:?}: {gap}");
                    assert!(work.is_done(), "{work:?}");
                    assert_eq!(model.encode_large(&bytes, tiling, &mut |_, _| ()).unwrap(), codes);
                    let (tiled, work) = decoded(&model, &codes, grid, tiling);
                    let gap = largest(tiled.clamp(-1.0, 1.0) - &picture);
                    assert!(gap < 1e-4, "{config:?}, {grid:?}, {tiling:?}: {gap}");
                    assert!(work.is_done(), "{work:?}");
                }
            }
        }
    }

    #[test]
    fn a_picture_that_fits_is_not_cut_and_has_the_same_digits() {
        let model = model(&configs()[1]);
        let bytes = bytes(24, 36);
        let x = to_unit(&bytes, Device::Cpu).unwrap();
        let never = &mut |_, _| panic!("a tile");
        assert_eq!(model.latent_large(&bytes, WHOLE, never).unwrap(), model.encode_latent(&x).unwrap());
        let codes = model.encode(&x).unwrap();
        assert_eq!(model.encode_large(&bytes, Tiling::DEFAULT, never).unwrap(), codes);
        let (picture, work) = decoded(&model, &codes, (6, 9), WHOLE);
        assert_eq!(picture.clamp(-1.0, 1.0), model.decode_codes(&codes, 6, 9).unwrap());
        assert_eq!(work, Work::default());
    }

    #[test]
    fn levels_are_cut_by_the_bytes_of_their_maps_and_never_with_attention() {
        let count = |config: &VqganConfig, map_bytes| {
            model(config).tiled_levels(Half::Encoder, Area::whole(16, 32), map_bytes).len()
        };
        let [_, inner, without, middle] = configs();
        // 64 channels in float32: the second level's come with the doubling to the first.
        let outermost = 16 * 32 * 64 * 4;
        assert_eq!([outermost, outermost - 1].map(|bytes| count(&inner, bytes)), [0, 1]);
        assert_eq!([outermost / 4, outermost / 4 - 1].map(|bytes| count(&inner, bytes)), [1, 2]);
        assert_eq!([&inner, &without, &middle].map(|config| count(config, 0)), [2, 2, 1]);
    }

    #[test]
    fn the_way_of_least_work_whose_maps_fit_is_taken() {
        let config = VqganConfig { ch_mult: vec![1, 1, 2, 2], ch: 32, ..configs()[2].clone() };
        let model = model(&config);
        let units = |half, held_bytes| {
            let plan = model.plan(half, Area::whole(64, 64), Tiling { map_bytes: 0, held_bytes, side: 32 });
            assert_eq!(plan.levels, 3);
            let levels = |unit: &Unit| (unit.outermost.index, unit.innermost.index);
            plan.units.iter().map(levels).collect::<Vec<_>>()
        };
        // 32 channels and, on the way out of the innermost levels, 64.
        let map = |side: i64, channels: i64| side * side * channels * 4;
        let (each, outer, inner, all) =
            (vec![(0, 0), (1, 1), (2, 2)], vec![(0, 0), (1, 2)], vec![(0, 1), (2, 2)], vec![(0, 2)]);
        let both = map(32, 32) + map(16, 32);
        assert_eq!([both, both - 1].map(|bytes| units(Half::Encoder, bytes)), [each.clone(), outer.clone()]);
        let innermost = map(8, 64);
        assert_eq!(units(Half::Encoder, map(32, 32) + innermost - 1), inner);
        assert_eq!(units(Half::Encoder, 0), all);
        let both = map(32, 32) + map(16, 64);
        assert_eq!([both, both - 1].map(|bytes| units(Half::Decoder, bytes)), [each, outer]);
        assert_eq!(units(Half::Decoder, map(32, 32) + innermost - 1), inner);
    }
}
