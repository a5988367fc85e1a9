//! Beam search over token sequences: which texts live on and which are the best, without a model.

/// A text under way or finished.
#[derive(Debug, Clone)]
pub struct Hypothesis {
    /// Its tokens.
    pub ids: Vec<i64>,
    /// Sum of the log-probabilities of its tokens and, where it is finished, of its end.
    pub logprob: f64,
    /// Whether it has come to its end.
    pub finished: bool,
}

impl Hypothesis {
    /// Mean log-probability a token.
    fn score(&self) -> f64 {
        let tokens = self.ids.len() + usize::from(self.finished);
        self.logprob / tokens.max(1) as f64
    }
}

/// The search for the captions of one picture in one language.
#[derive(Debug)]
pub struct Search {
    /// Texts under way, at least one.
    pub live: Vec<Hypothesis>,
    /// Finished texts, the best first.
    finished: Vec<Hypothesis>,
}

/// A way to go on with a hypothesis.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Place of the hypothesis among those under way.
    pub parent: usize,
    /// The next token.
    pub id: i64,
    /// The sum with it.
    pub logprob: f64,
}

impl Search {
    /// A search before its first token.
    pub fn new() -> Self {
        let start = Hypothesis { ids: Vec::new(), logprob: 0.0, finished: false };
        Self { live: vec![start], finished: Vec::new() }
    }

    /// Takes the best `beams` candidates that go on; those that end count if they are among the best `beams` of
    /// all, which makes one beam greedy. Returns the parent of each hypothesis that lives on.
    pub fn advance(&mut self, mut candidates: Vec<Candidate>, end: i64, beams: usize) -> Vec<usize> {
        candidates.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
        let (mut parents, mut live) = (Vec::with_capacity(beams), Vec::with_capacity(beams));
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let mut ids = self.live[candidate.parent].ids.clone();
            if candidate.id != end && live.len() < beams {
                ids.push(candidate.id);
                live.push(Hypothesis { ids, logprob: candidate.logprob, finished: false });
                parents.push(candidate.parent);
            } else if candidate.id == end && rank < beams {
                self.finished.push(Hypothesis { ids, logprob: candidate.logprob, finished: true });
            }
        }
        self.live = live;
        self.rank(beams);
        parents
    }

    /// The finished texts by their score, then the best of those that were cut, at most `beams` in all.
    pub fn into_ranked(mut self, beams: usize) -> Vec<Hypothesis> {
        self.live.sort_by(|a, b| b.score().total_cmp(&a.score()));
        self.finished.append(&mut self.live);
        self.finished.truncate(beams);
        self.finished
    }

    fn rank(&mut self, beams: usize) {
        self.finished.sort_by(|a, b| b.score().total_cmp(&a.score()));
        self.finished.truncate(beams);
    }

    /// Whether `beams` texts are finished and none under way has a better mean so far.
    pub fn is_done(&self, beams: usize) -> bool {
        let best_live = self.live.iter().map(Hypothesis::score).fold(f64::NEG_INFINITY, f64::max);
        self.finished.len() == beams && self.finished.iter().all(|text| text.score() >= best_live)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: i64 = 1;
    const B: i64 = 2;
    const END: i64 = 9;

    #[test]
    fn two_beams_find_what_greed_misses() {
        // "a" is likelier than "b", but only "b" has a likely end.
        let next = |ids: &[i64]| match ids {
            [] => [(A, 0.6f64), (B, 0.39), (END, 0.01)],
            [.., A] => [(A, 0.35), (B, 0.34), (END, 0.31)],
            _ => [(A, 0.04), (B, 0.01), (END, 0.95)],
        };
        let best = |beams: usize| {
            let mut search = Search::new();
            for _ in 0..8 {
                let all = search.live.iter().enumerate().flat_map(|(parent, text)| {
                    let sum = text.logprob;
                    next(&text.ids).map(|(id, p)| Candidate { parent, id, logprob: sum + p.ln() })
                });
                let _ = search.advance(all.collect(), END, beams);
                if search.is_done(beams) {
                    break;
                }
            }
            search.into_ranked(beams).remove(0)
        };
        let found = best(2);
        assert_eq!((found.ids, found.finished), (vec![B], true));
        assert!((found.logprob - (0.39f64 * 0.95).ln()).abs() < 1e-12);
        let greedy = best(1);
        assert_eq!((greedy.ids, greedy.finished), (vec![A; 8], false));
    }

    #[test]
    fn cut_texts_come_after_finished_ones() {
        let text = |ids: &[i64], logprob, finished| Hypothesis { ids: ids.to_vec(), logprob, finished };
        let search = Search {
            live: vec![text(&[A, A], -1.0, false), text(&[A, B], -0.5, false)],
            finished: vec![text(&[B], -9.0, true)],
        };
        let ranked: Vec<Vec<i64>> = search.into_ranked(2).into_iter().map(|text| text.ids).collect();
        assert_eq!(ranked, [vec![B], vec![A, B]]);
    }

    #[test]
    fn an_end_out_of_the_best_beams_does_not_count() {
        let candidates = |all: &[(i64, f64)]| {
            all.iter().map(|&(id, logprob)| Candidate { parent: 0, id, logprob }).collect::<Vec<_>>()
        };
        let mut search = Search::new();
        let parents = search.advance(candidates(&[(1, -1.0), (END, -2.0), (2, -3.0)]), END, 1);
        assert_eq!((parents, search.finished.len()), (vec![0], 0));
        assert_eq!(search.live[0].ids, [1]);
        search.advance(candidates(&[(END, -1.5), (3, -1.6)]), END, 1);
        assert_eq!(search.finished[0].ids, [1]);
        assert!(search.is_done(1));
    }

    #[test]
    fn the_mean_ranks_and_a_better_unfinished_text_keeps_the_search_going() {
        let text =
            |tokens: usize, logprob: f64, finished| Hypothesis { ids: vec![0; tokens], logprob, finished };
        let mut search = Search {
            live: vec![text(3, -2.0, false)],
            finished: vec![text(1, -2.0, true), text(3, -3.0, true)],
        };
        search.rank(2);
        assert_eq!(search.finished[0].ids.len(), 3, "-3/4 is above -2/2");
        assert!(!search.is_done(2), "-2/3 may still beat -1");
        search.live[0].logprob = -3.1;
        assert!(search.is_done(2));
    }
}
