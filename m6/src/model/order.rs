//! The order in which the codes of a picture are drawn.

use serde::{Deserialize, Serialize};

/// An order of the places of a code grid.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodeOrder {
    /// Row by row.
    #[default]
    Rows,
    /// First a wide lattice over the whole picture, then the places between its points, and so on: what is drawn first
    /// says where everything is, and not only what is at the top.
    CoarseToFine,
}

impl CodeOrder {
    /// The places of a grid of `grid` by `grid` codes, counted along its rows, in the order of drawing.
    pub fn places(self, grid: i64) -> Vec<i64> {
        let mut places: Vec<i64> = (0..grid * grid).collect();
        if self == Self::CoarseToFine {
            // The first row and column, number 0, are on every lattice.
            let level = |line: i64| if line == 0 { i64::BITS } else { line.trailing_zeros() };
            places.sort_by_key(|place| std::cmp::Reverse(level(place / grid).min(level(place % grid))));
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_comes_once_and_lattices_are_halved() {
        assert_eq!(CodeOrder::Rows.places(3), (0..9).collect::<Vec<_>>());
        for grid in [1, 3, 4, 16] {
            let mut places = CodeOrder::CoarseToFine.places(grid);
            places.sort_unstable();
            assert_eq!(places, (0..grid * grid).collect::<Vec<_>>());
        }
        let places = CodeOrder::CoarseToFine.places(4);
        assert_eq!(places[..4], [0, 2, 8, 10], "every second place of every second row");
        assert_eq!(places[4..], [1, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 15]);
    }
}
