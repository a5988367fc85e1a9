//! Packing: items of different lengths into rows of a fixed budget.
//!
//! A row is filled in order until the next item does not fit. The gap that is left is closed with the longest items that
//! fit from a look-ahead window (best fit), so that hardly anything of a row is padding and no item waits for long.

use std::collections::VecDeque;

/// Tokens beyond a row's budget among which the items that close its gap are looked for. Enough for a few dozen
/// pictures or a thousand captions, and little beside the rows of a large run.
const LOOK_AHEAD: usize = 1 << 14;

/// Something that takes room in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<T> {
    /// Its place in the stream that it comes from.
    pub ordinal: u64,
    /// Room that it takes.
    pub tokens: usize,
    /// What it is.
    pub value: T,
}

/// Collects items and gives rows. What a row holds depends on the items alone, not on when they come.
#[derive(Debug)]
pub struct RowPacker<T> {
    budget: usize,
    waiting: VecDeque<Item<T>>,
    tokens: usize,
}

impl<T> RowPacker<T> {
    /// A packer of rows of `budget` tokens.
    pub fn new(budget: usize) -> Self {
        Self::resume(budget, [])
    }

    /// A packer in which these items wait already, in the order of [`RowPacker::waiting`]: it goes on as the one that
    /// they were taken from would have.
    pub fn resume(budget: usize, waiting: impl IntoIterator<Item = Item<T>>) -> Self {
        let waiting: VecDeque<_> = waiting.into_iter().collect();
        let tokens = waiting.iter().map(|item| item.tokens).sum();
        Self { budget, waiting, tokens }
    }

    /// Takes an item, and gives the next row once enough items wait behind it.
    pub fn push(&mut self, item: Item<T>) -> Option<Vec<Item<T>>> {
        self.tokens += item.tokens;
        self.waiting.push_back(item);
        if self.tokens < self.budget + LOOK_AHEAD { None } else { self.flush() }
    }

    /// The next row of what waits, `None` where nothing does. An item longer than a row gets a row of its own.
    pub fn flush(&mut self) -> Option<Vec<Item<T>>> {
        let first = self.waiting.pop_front()?;
        let mut room = self.budget.saturating_sub(first.tokens);
        let mut row = vec![first];
        while self.waiting.front().is_some_and(|item| item.tokens <= room)
            && let Some(item) = self.waiting.pop_front()
        {
            room -= item.tokens;
            row.push(item);
        }
        while let Some(item) = self.longest_within(room).and_then(|longest| self.waiting.remove(longest)) {
            room -= item.tokens;
            row.push(item);
        }
        self.tokens -= row.iter().map(|item| item.tokens).sum::<usize>();
        Some(row)
    }

    /// Ordinals of the items that are in no row yet, the longest waiting first.
    pub fn waiting(&self) -> impl Iterator<Item = u64> + '_ {
        self.waiting.iter().map(|item| item.ordinal)
    }

    /// The first of the longest waiting items that take at most `room`.
    fn longest_within(&self, room: usize) -> Option<usize> {
        let fitting = self.waiting.iter().enumerate().filter(|(_, item)| item.tokens <= room);
        fitting.min_by_key(|(_, item)| std::cmp::Reverse(item.tokens)).map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(ordinal: usize, tokens: usize) -> Item<()> {
        Item { ordinal: ordinal as u64, tokens, value: () }
    }

    fn ordinals(row: &[Item<()>]) -> Vec<u64> {
        row.iter().map(|item| item.ordinal).collect()
    }

    /// All rows of items of these lengths.
    fn rows(packer: &mut RowPacker<()>, lengths: &[usize], first: usize) -> Vec<Vec<Item<()>>> {
        let pushed: Vec<_> =
            lengths.iter().enumerate().filter_map(|(i, &n)| packer.push(item(first + i, n))).collect();
        pushed.into_iter().chain(std::iter::from_fn(|| packer.flush())).collect()
    }

    #[test]
    fn the_oldest_come_first_and_the_longest_that_fit_close_the_gap() {
        let mut packer = RowPacker::new(10);
        for (ordinal, tokens) in [4, 4, 5, 1, 2, 2].into_iter().enumerate() {
            assert_eq!(packer.push(item(ordinal, tokens)), None, "the window is not full");
        }
        assert_eq!(ordinals(&packer.flush().unwrap()), [0, 1, 4]);
        assert_eq!(packer.waiting().collect::<Vec<_>>(), [2, 3, 5]);
        assert_eq!(ordinals(&packer.flush().unwrap()), [2, 3, 5]);
        assert_eq!(packer.flush(), None);
    }

    #[test]
    fn rows_of_captions_and_pictures_are_full() {
        const BUDGET: usize = 1536;
        // Codes of a picture behind a prompt, patches before a caption, a caption alone.
        let lengths: Vec<usize> =
            (0..4_000).map(|i| [258 + i % 13, 66 + i % 9, 5 + i % 11][i * 7 % 3]).collect();
        let rows = rows(&mut RowPacker::new(BUDGET), &lengths, 0);
        let whole = &rows[..rows.len() * 9 / 10];
        let used: usize = whole.iter().flatten().map(|item| item.tokens).sum();
        let fill = used as f64 / (whole.len() * BUDGET) as f64;
        assert!(fill > 0.995, "{fill}");
    }

    #[test]
    fn what_is_longer_than_a_row_gets_its_own() {
        let rows = rows(&mut RowPacker::new(10), &[3, 25, 7, 12], 0);
        assert_eq!(rows.iter().map(|row| ordinals(row)).collect::<Vec<_>>(), [vec![0, 2], vec![1], vec![3]]);
    }

    proptest! {
        #[test]
        fn every_item_is_in_one_row_and_nothing_that_waits_would_fit_into_it(
            lengths in prop::collection::vec(1..300_usize, 0..500),
            budget in 300..3_000_usize,
        ) {
            let mut packer = RowPacker::new(budget);
            let mut seen = Vec::new();
            let mut check = |packer: &RowPacker<()>, row: Option<Vec<Item<()>>>| {
                let Some(row) = row else { return Ok(()) };
                let used: usize = row.iter().map(|item| item.tokens).sum();
                prop_assert!(used <= budget);
                prop_assert!(packer.waiting.iter().all(|item| item.tokens > budget - used));
                prop_assert!(packer.waiting().all(|waiting| waiting > row[0].ordinal), "the oldest came first");
                seen.extend(ordinals(&row));
                Ok(())
            };
            for (ordinal, &tokens) in lengths.iter().enumerate() {
                let row = packer.push(item(ordinal, tokens));
                check(&packer, row)?;
            }
            while let Some(row) = packer.flush() {
                check(&packer, Some(row))?;
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len() as u64).collect::<Vec<_>>());
        }

        #[test]
        fn a_resumed_packer_goes_on_as_if_it_had_not_stopped(
            lengths in prop::collection::vec(1..600_usize, 1..500),
            budget in 200..2_000_usize,
            cut in any::<prop::sample::Index>(),
        ) {
            let expected = rows(&mut RowPacker::new(budget), &lengths, 0);
            let (before, after) = lengths.split_at(cut.index(lengths.len()));
            let mut stopped = RowPacker::new(budget);
            let mut made: Vec<_> =
                before.iter().enumerate().filter_map(|(i, &n)| stopped.push(item(i, n))).collect();
            let waiting = stopped.waiting().map(|i| item(i as usize, lengths[i as usize]));
            let mut resumed = RowPacker::resume(budget, waiting);
            made.extend(rows(&mut resumed, after, before.len()));
            prop_assert_eq!(made, expected);
        }
    }
}
