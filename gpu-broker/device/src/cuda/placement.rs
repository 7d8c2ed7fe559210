//! Where a range's weights lie for one stay. Programs that can be moved (`twins/executable.rs`) find them in the pool's window, which is always there,
//! so that nothing need be mapped for them: but for a tensor whose chunks do not lie in a row, which they find at the range's own addresses.

use super::Stretch;
use crate::Group;

/// A part of some weights: from its first byte up to another one, not included.
pub(super) type Span = std::ops::Range<u64>;

/// Where weights lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Tells placements on a device apart.
    pub(super) number: u64,
    /// Which chunks of the pool they lie in.
    chunks: Vec<usize>,
    chunk: u64,
    /// Where the pool's first chunk is.
    window: u64,
    /// The range's own first address.
    base: u64,
    /// What is used at the range's own addresses, in order.
    own: Vec<Span>,
}

impl Placement {
    /// Of weights in these chunks. Those that `whole` names, in order, must each lie in a row; `None` for weights that are used at the
    /// range's own addresses alone.
    pub(super) fn new(
        number: u64,
        (chunks, chunk): (Vec<usize>, usize),
        (window, base): (u64, u64),
        whole: Option<&[Span]>,
    ) -> Self {
        let chunk = chunk as u64;
        let is_cut = |span: &Span| chunks[places(span, chunk)].windows(2).any(|pair| pair[1] != pair[0] + 1);
        let own = match whole {
            Some(whole) => whole.iter().filter(|span| is_cut(span)).cloned().collect(),
            None => std::iter::once(0..chunks.len() as u64 * chunk).collect(),
        };
        Self { number, chunks, chunk, window, base, own }
    }

    pub(super) fn chunks(&self) -> &[usize] {
        &self.chunks
    }

    /// Where a program finds a byte of the weights.
    pub(super) fn address(&self, offset: u64) -> u64 {
        let next = self.own.partition_point(|span| span.end <= offset);
        if self.own.get(next).is_some_and(|span| span.start <= offset) {
            return self.base + offset;
        }
        self.in_window(offset)
    }

    /// Where a byte of the weights is in the pool's window.
    fn in_window(&self, offset: u64) -> u64 {
        let chunk = usize::try_from(offset / self.chunk).ok().and_then(|place| self.chunks.get(place));
        // Behind the last chunk there is nothing of the weights.
        let chunk = chunk.map_or(u64::MAX, |&chunk| chunk as u64);
        self.window.wrapping_add(chunk.wrapping_mul(self.chunk)).wrapping_add(offset % self.chunk)
    }

    /// Whether the chunk at this place must be put behind the range's own addresses.
    pub(super) fn is_own(&self, place: usize) -> bool {
        let begin = place as u64 * self.chunk;
        let next = self.own.partition_point(|span| span.end <= begin);
        self.own.get(next).is_some_and(|span| span.start < begin + self.chunk)
    }

    /// A part of the weights as it lies in the window: addresses and lengths, those in a row together.
    pub(super) fn pieces(&self, Span { start, end }: Span) -> Vec<Stretch> {
        let mut pieces: Vec<Stretch> = Vec::new();
        let mut at = start;
        while at < end {
            let len = (self.chunk - at % self.chunk).min(end - at);
            let address = self.in_window(at);
            match pieces.last_mut() {
                Some((first, have)) if *first + *have == address => *have += len,
                _ => pieces.push((address, len)),
            }
            at += len;
        }
        pieces
    }
}

/// The places of the chunks that a span touches.
fn places(span: &Span, chunk: u64) -> std::ops::Range<usize> {
    let place = |bytes: u64| usize::try_from(bytes).expect("weights have been mapped");
    place(span.start / chunk)..place(span.end.div_ceil(chunk))
}

/// Tensors of a model's weights: those that share bytes are one, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensors(Vec<Span>);

impl Tensors {
    pub(super) fn new(tensors: &[Group]) -> Self {
        let mut spans: Vec<Span> = tensors.iter().map(|tensor| tensor.offset..tensor.offset + tensor.len).collect();
        spans.retain(|span| !span.is_empty());
        spans.sort_by_key(|span| span.start);
        spans.dedup_by(|next, last| {
            let shares = next.start < last.end;
            if shares {
                last.end = last.end.max(next.end);
            }
            shares
        });
        Self(spans)
    }

    /// Whether a byte is one of a tensor's.
    pub(super) fn have(&self, offset: u64) -> bool {
        let next = self.0.partition_point(|span| span.end <= offset);
        self.0.get(next).is_some_and(|span| span.start <= offset)
    }

    /// Those that lie in more than one chunk.
    pub(super) fn crossing(&self, chunk: u64) -> Vec<Span> {
        self.0.iter().filter(|span| places(span, chunk).len() > 1).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u64 = 0x10_0000;
    const BASE: u64 = 0x90_0000;

    fn placement(chunks: &[usize], whole: Option<&[Span]>) -> Placement {
        Placement::new(1, (chunks.to_vec(), 8), (WINDOW, BASE), whole)
    }

    #[test]
    fn tensors_lie_in_the_window_but_for_those_that_are_cut_in_two() {
        // Chunks 4 and 5 lie in a row, 5 and 2 do not.
        let found = placement(&[4, 5, 2], Some(&[6..10, 14..17]));
        let address = |offset| found.address(offset);
        assert_eq!((address(0), address(6), address(9)), (WINDOW + 32, WINDOW + 38, WINDOW + 41));
        assert_eq!((address(13), address(14), address(16)), (WINDOW + 45, BASE + 14, BASE + 16));
        assert_eq!(address(17), WINDOW + 17);
        assert_eq!([0, 1, 2].map(|place| found.is_own(place)), [false, true, true]);
        let all = placement(&[3, 4, 5], Some(&[6..10, 14..17]));
        assert!((0..24).all(|offset| all.address(offset) == WINDOW + 24 + offset));
        assert!((0..3).all(|place| !all.is_own(place)));
    }

    #[test]
    fn a_tensor_of_many_chunks_is_cut_where_any_two_are_apart() {
        let whole = 0..24;
        let found = placement(&[1, 2, 4], Some(std::slice::from_ref(&whole)));
        assert_eq!((found.address(0), found.address(23)), (BASE, BASE + 23));
        assert!((0..3).all(|place| found.is_own(place)));
    }

    #[test]
    fn programs_that_cannot_be_moved_use_the_ranges_own_addresses() {
        let found = placement(&[1, 2], None);
        assert_eq!((found.address(0), found.address(15)), (BASE, BASE + 15));
        assert!(found.is_own(0) && found.is_own(1));
        assert_eq!(found.pieces(2..16), [(WINDOW + 10, 14)]);
    }

    #[test]
    fn pieces_are_what_lies_in_a_row_in_the_window() {
        let found = placement(&[1, 2, 0], Some(&[]));
        assert_eq!(found.pieces(4..20), [(WINDOW + 12, 12), (WINDOW, 4)]);
        assert_eq!(found.pieces(9..9), []);
    }

    #[test]
    fn tensors_that_share_bytes_are_one() {
        let tensor = |offset, len| Group { offset, len };
        let tensors = Tensors::new(&[tensor(20, 4), tensor(0, 8), tensor(4, 6), tensor(12, 0), tensor(12, 6)]);
        assert_eq!(tensors, Tensors(vec![0..10, 12..18, 20..24]));
        assert_eq!([0, 9, 10, 12, 18, 24].map(|offset| tensors.have(offset)), [true, true, false, true, false, false]);
        assert_eq!(tensors.crossing(8), [0..10, 12..18]);
    }
}
