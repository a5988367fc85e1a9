//! A level of the network in tiles, with the result that it has on the whole feature map.
//!
//! Its convolutions see a few positions around each, so a tile is computed with a margin that wide, whose outer rings are
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

/// One tile of a pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    /// What it contributes, on the map.
    pub(crate) own: Area,
    /// The same on the tile with its margin.
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

/// A level and how it is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TiledLevel {
    /// The feature maps that its norms see.
    pub(crate) map: Area,
    /// Side of a tile without its margin, even.
    pub(crate) side: i64,
    /// How far its convolutions reach, even.
    pub(crate) margin: i64,
    /// Norms in it.
    pub(crate) norms: u64,
}

impl TiledLevel {
    /// Tiles of all passes.
    pub(crate) fn runs(&self) -> u64 {
        self.map.tiles(self.side).count() as u64 * (self.norms + 1)
    }

    /// Computes all tiles: `read` gives the input of an area of the map, `run` is the level, and `write` takes the tiles of
    /// the last pass with their margins. `advance` is called after each run of a tile.
    pub(crate) fn compute(
        &self,
        read: impl Fn(Area) -> Result<Tensor>,
        run: impl Fn(Tensor, &mut TileNorms) -> std::result::Result<Tensor, Gathered>,
        mut write: impl FnMut(Tile, &Tensor),
        mut advance: impl FnMut(),
    ) -> Result<()> {
        let mut known = Vec::new();
        loop {
            let mut gathered = None;
            for own in self.map.tiles(self.side) {
                let read_area = own.grown(self.margin, self.map);
                let inside = own.within(read_area);
                let mut norms = TileNorms { known: &known, used: 0, inside, gathered: &mut gathered };
                if let Ok(y) = run(read(read_area)?, &mut norms) {
                    write(Tile { own, inside }, &y);
                }
                advance();
            }
            match gathered {
                Some(moments) => known.push(moments),
                None => return Ok(()),
            }
        }
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

    #[test]
    fn no_tile_is_larger_than_its_side_and_margins_and_each_position_is_written() {
        let level = TiledLevel { map: Area::whole(20, 30), side: 8, margin: 4, norms: 0 };
        let written = Tensor::zeros([1, 1, 20, 30], (Kind::Float, Device::Cpu));
        let mut runs = 0;
        let read = |area: Area| {
            assert!(area.height <= 16 && area.width <= 16, "{area:?}");
            Ok(Tensor::ones([1, 1, area.height, area.width], (Kind::Float, Device::Cpu)))
        };
        let write = |tile: Tile, y: &Tensor| {
            let _ = tile.own.of(&written).g_add_(&tile.inside.of(y));
        };
        level.compute(read, |x, _| Ok(x), write, || runs += 1).unwrap();
        assert_eq!(written, written.ones_like());
        assert_eq!((runs, level.runs()), (12, 12));
    }
}
