//! Consecutive levels of the network in tiles, with the result that they have on whole feature maps.
//!
//! Their convolutions see a few positions around each, so a tile is computed with a margin that wide, whose outer rings are
//! wrong and are cut off. At the border of the picture there is no margin: there the convolutions pad as ever. What
//! couples all positions is the moments of the group norms. They are gathered norm by norm: each pass over the tiles goes
//! as far as the first norm whose moments are not known, and the last one to the end.

use m6_runtime::nn::{GroupNorm, Moments};
use tch::Tensor;

use crate::error::Result;
use crate::layers::Norms;

/// A rectangle of a feature map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    top: i64,
    left: i64,
    pub(crate) height: i64,
    pub(crate) width: i64,
}

impl Area {
    /// All of a map of such sides.
    pub(crate) fn whole(height: i64, width: i64) -> Self {
        Self { top: 0, left: 0, height, width }
    }

    /// The same on the map of the next level inside.
    pub(crate) fn halved(self) -> Self {
        Self { top: self.top / 2, left: self.left / 2, height: self.height / 2, width: self.width / 2 }
    }

    /// The part of `map`, `[b, c, h, w]`, without a copy.
    pub(crate) fn of(self, map: &Tensor) -> Tensor {
        map.narrow(2, self.top, self.height).narrow(3, self.left, self.width)
    }

    /// With `margin` more on each side, as far as `bounds` reach.
    fn grown(self, margin: i64, bounds: Self) -> Self {
        let (top, left) = ((self.top - margin).max(bounds.top), (self.left - margin).max(bounds.left));
        let bottom = (self.top + self.height + margin).min(bounds.top + bounds.height);
        let right = (self.left + self.width + margin).min(bounds.left + bounds.width);
        Self { top, left, height: bottom - top, width: right - left }
    }

    /// The same rectangle, seen from the corner of `outer`.
    fn within(self, outer: Self) -> Self {
        Self { top: self.top - outer.top, left: self.left - outer.left, ..self }
    }

    /// How many positions it has.
    pub(crate) fn positions(self) -> i64 {
        self.height * self.width
    }

    /// Cut into squares of `side` and what remains at the right and below.
    fn tiles(self, side: i64) -> impl Iterator<Item = Self> {
        let steps = move |length: i64| (0..length).step_by(side as usize);
        steps(self.height).flat_map(move |top| {
            steps(self.width).map(move |left| Self {
                top: self.top + top,
                left: self.left + left,
                height: side.min(self.height - top),
                width: side.min(self.width - left),
            })
        })
    }
}

/// What a tile is on one level.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// What it contributes, on the level's map.
    own: Area,
    /// The same with the margin of the level.
    computed: Area,
}

/// A tile that is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    /// What it contributes, on the map that is made.
    pub(crate) own: Area,
    /// The same on the tile with what is left of its margin.
    pub(crate) inside: Area,
}

/// The norms of a tile: by the moments of the whole map where they are known.
#[derive(Debug)]
pub(crate) struct TileNorms<'a> {
    known: &'a [Moments],
    used: usize,
    inside: Area,
    gathered: &'a mut Option<Moments>,
}

/// A tile came to a norm whose moments are not known yet, and has added its own.
#[derive(Debug)]
pub(crate) struct Gathered;

impl Norms for TileNorms<'_> {
    type Stop = Gathered;

    fn swish(&mut self, norm: &GroupNorm, x: &Tensor) -> std::result::Result<Tensor, Gathered> {
        let Some(moments) = self.known.get(self.used) else {
            let own = norm.moments(&self.inside.of(x));
            *self.gathered = Some(match self.gathered.take() {
                Some(others) => others.merged(&own),
                None => own,
            });
            return Err(Gathered);
        };
        self.used += 1;
        Ok(norm.forward_swish_by(x, moments))
    }
}

/// Which half of the network levels belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// The outermost level comes first, and each ends by halving the sides of its map.
    Encoder,
    /// The outermost level comes last, and each begins by doubling the sides of what the one inside of it made.
    Decoder,
}

impl Half {
    /// What a level takes for `area` of its map, on the map that comes in.
    fn taken(self, area: Area) -> Area {
        match self {
            Self::Encoder => area,
            Self::Decoder => area.halved(),
        }
    }

    /// What a level makes of `area` of its map, on the map that goes out.
    fn made(self, area: Area) -> Area {
        match self {
            Self::Encoder => area.halved(),
            Self::Decoder => area,
        }
    }
}

/// A level that is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TiledLevel {
    /// 0 being the outermost.
    pub(crate) index: usize,
    /// The feature maps that its norms see.
    pub(crate) map: Area,
    /// How far its convolutions reach.
    pub(crate) reach: i64,
    /// Norms in it.
    pub(crate) norms: usize,
    /// Operations a position before the first norm.
    pub(crate) first_work: i64,
    /// Operations a position after each norm.
    pub(crate) norm_work: i64,
    /// Bytes of the map between it and the next level inside.
    pub(crate) inner_bytes: i64,
}

/// Consecutive levels that are computed together tile by tile, so that no map between them is held.
#[derive(Debug)]
pub(crate) struct Unit {
    half: Half,
    /// In the order of computation, each with its margin: what it and the levels after it in the unit need around a tile.
    levels: Vec<(TiledLevel, i64)>,
    pub(crate) outermost: TiledLevel,
    pub(crate) innermost: TiledLevel,
    side: i64,
}

impl Unit {
    /// Of `levels`, at least one, outermost first. `side` is that of a tile without its margin on the outermost map, a
    /// multiple of two to the number of levels.
    pub(crate) fn new(half: Half, levels: &[TiledLevel], side: i64) -> Self {
        let (outermost, innermost) = (levels[0], levels[levels.len() - 1]);
        let mut levels = levels.iter().map(|level| (*level, level.reach)).collect::<Vec<_>>();
        if half == Half::Decoder {
            levels.reverse();
        }
        let mut needed = 0;
        for (_, margin) in levels.iter_mut().rev() {
            *margin += needed;
            // Halves of it are whole.
            *margin += *margin % 2;
            needed = match half {
                Half::Encoder => 2 * *margin,
                Half::Decoder => *margin / 2,
            };
        }
        Self { half, levels, outermost, innermost, side }
    }

    fn norms(&self) -> usize {
        self.levels.iter().map(|(level, _)| level.norms).sum()
    }

    /// Operations of all passes.
    pub(crate) fn work(&self) -> u64 {
        let passes = |parts: Vec<Part>| (0..=self.norms()).map(move |known| self.work_of(&parts, known));
        self.tiles().flat_map(passes).sum()
    }

    /// Operations of a tile in the pass in which the moments of `known` norms are known.
    fn work_of(&self, parts: &[Part], mut known: usize) -> u64 {
        let mut work = 0;
        for ((level, _), part) in self.levels.iter().zip(parts) {
            let norms = known.min(level.norms);
            work += part.computed.positions() * (level.first_work + level.norm_work * norms as i64);
            // It has a norm whose moments are not known.
            if known < level.norms {
                break;
            }
            known -= norms;
        }
        work as u64
    }

    /// The tiles, each as its parts in the order of computation.
    fn tiles(&self) -> impl Iterator<Item = Vec<Part>> {
        self.outermost.map.tiles(self.side).map(|tile| {
            let part = |(level, margin): &(TiledLevel, i64)| {
                let own = (self.outermost.index..level.index).fold(tile, |area, _| area.halved());
                Part { own, computed: own.grown(*margin, level.map) }
            };
            self.levels.iter().map(part).collect()
        })
    }

    /// Computes all tiles: `read` gives the input of an area of the map that comes in, `run` is the level of an index, and
    /// `write` takes the tiles of the last pass. `advance` is called after each run of a tile with its operations.
    pub(crate) fn compute(
        &self,
        read: impl Fn(Area) -> Result<Tensor>,
        run: impl Fn(usize, Tensor, &mut TileNorms) -> std::result::Result<Tensor, Gathered>,
        mut write: impl FnMut(Tile, &Tensor),
        mut advance: impl FnMut(u64),
    ) -> Result<()> {
        let mut known = Vec::new();
        loop {
            let mut gathered = None;
            for parts in self.tiles() {
                let x = read(self.half.taken(parts[0].computed))?;
                let norms =
                    TileNorms { known: &known, used: 0, inside: parts[0].own, gathered: &mut gathered };
                if let Ok((tile, y)) = self.run_tile(&parts, x, &run, norms) {
                    write(tile, &y);
                }
                advance(self.work_of(&parts, known.len()));
            }
            match gathered {
                Some(moments) => known.push(moments),
                None => return Ok(()),
            }
        }
    }

    fn run_tile(
        &self,
        parts: &[Part],
        mut x: Tensor,
        run: impl Fn(usize, Tensor, &mut TileNorms) -> std::result::Result<Tensor, Gathered>,
        mut norms: TileNorms,
    ) -> std::result::Result<(Tile, Tensor), Gathered> {
        let mut made = self.half.taken(parts[0].computed);
        for ((level, _), part) in self.levels.iter().zip(parts) {
            norms.inside = part.own.within(part.computed);
            x = run(level.index, self.half.taken(part.computed).within(made).of(&x), &mut norms)?;
            made = self.half.made(part.computed);
        }
        let own = self.half.made(parts[parts.len() - 1].own);
        Ok((Tile { own, inside: own.within(made) }, x))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn tiles_cover_the_map_once_and_margins_end_at_its_border() {
        let map = Area::whole(10, 6);
        let tiles: Vec<_> = map.tiles(4).collect();
        assert_eq!(tiles.len(), 3 * 2);
        assert_eq!(tiles.iter().map(|tile| tile.height * tile.width).sum::<i64>(), 60);
        let last = tiles[5];
        assert_eq!(last, Area { top: 8, left: 4, height: 2, width: 2 });
        let grown = last.grown(2, map);
        assert_eq!(grown, Area { top: 6, left: 2, height: 4, width: 4 });
        assert_eq!(last.within(grown), Area { top: 2, left: 2, height: 2, width: 2 });
        assert_eq!(map.tiles(16).collect::<Vec<_>>(), [map]);
    }

    /// The levels `indices` of a map of 40 x 24 positions, each of one norm.
    fn unit(half: Half, indices: std::ops::Range<usize>) -> Unit {
        let maps = std::iter::successors(Some(Area::whole(40, 24)), |map| Some(map.halved()));
        let level = |(index, map)| TiledLevel {
            index,
            map,
            reach: 3,
            norms: 1,
            first_work: 1,
            norm_work: 100,
            inner_bytes: 0,
        };
        let levels: Vec<_> = (0..).zip(maps).map(level).skip(indices.start).take(indices.len()).collect();
        Unit::new(half, &levels, 16)
    }

    #[test]
    fn a_level_has_the_margin_that_those_after_it_need() {
        let margins = |unit: &Unit| unit.levels.iter().map(|(_, margin)| *margin).collect::<Vec<_>>();
        // Twice what the smaller map needs.
        assert_eq!(margins(&unit(Half::Encoder, 0..3)), [4 + 2 * 12, 4 + 2 * 4, 4]);
        // Half of what the larger map needs.
        assert_eq!(margins(&unit(Half::Decoder, 0..3)), [6, 6, 4]);
    }

    #[test]
    fn the_work_of_a_pass_is_that_of_the_levels_it_reaches() {
        let unit = unit(Half::Decoder, 1..3);
        // All of the map of 20 x 12 and, inside of it, of 10 x 6.
        let parts = unit.tiles().next().unwrap();
        let [inner, outer] = [10 * 6, 16 * 12 + 4 * 12].map(|positions| positions as u64);
        assert_eq!(parts.len(), 2);
        assert_eq!(
            [0, 1, 2].map(|known| unit.work_of(&parts, known)),
            [inner, inner * 101 + outer, (inner + outer) * 101]
        );
    }

    /// Levels that only halve or double the sides.
    #[test]
    fn every_position_is_written_once_and_has_the_place_that_it_has_on_the_whole() {
        for (half, indices) in [Half::Encoder, Half::Decoder]
            .into_iter()
            .flat_map(|half| [(half, 0..1), (half, 0..2), (half, 1..3)])
        {
            let unit = unit(half, indices);
            let outer = unit.outermost.map;
            let inner = unit.innermost.map.halved();
            let (taken, made) = if half == Half::Encoder { (outer, inner) } else { (inner, outer) };
            let places = Tensor::arange(taken.positions(), (Kind::Float, Device::Cpu));
            let places = places.view([1, 1, taken.height, taken.width]);
            let level = |x: &Tensor| match half {
                Half::Encoder => x.slice(2, 0, None, 2).slice(3, 0, None, 2),
                Half::Decoder => {
                    x.repeat_interleave_self_int(2, 2, None).repeat_interleave_self_int(2, 3, None)
                }
            };
            let written = Tensor::zeros([1, 1, made.height, made.width], (Kind::Float, Device::Cpu));
            let write = |tile: Tile, y: &Tensor| {
                let _ = tile.own.of(&written).g_add_(&tile.inside.of(y));
            };
            unit.compute(|area| Ok(area.of(&places)), |_, x, _| Ok(level(&x)), write, |_| ()).unwrap();
            let expected = (0..unit.levels.len()).fold(places.shallow_clone(), |x, _| level(&x));
            assert_eq!(written, expected);
        }
    }
}
