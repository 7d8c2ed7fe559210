//! One part of prepared weights by its origin: an original's weights as they are, or with their dimensions in another order.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Where a part comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Part {
    /// It is the same for all models of the kind.
    Kept,
    /// The bytes of the weights with this name.
    Copied(String),
    /// The same, transposed.
    Moved {
        /// Whose.
        from: String,
        /// Each dimension's place before.
        order: Vec<usize>,
    },
    /// Matrices of so many rows beside each other.
    Joined {
        /// How many.
        rows: usize,
        /// Where each comes from.
        parts: Vec<Self>,
    },
}

/// The orders that optimizers put dimensions in.
const ORDERS: [&[usize]; 6] = [&[1, 0], &[0, 2, 1], &[0, 2, 3, 1], &[0, 3, 1, 2], &[2, 3, 1, 0], &[3, 2, 0, 1]];

/// The orders that make one shape the other.
pub(super) fn orders(from: &[i64], to: &[i64]) -> impl Iterator<Item = &'static [usize]> {
    let fits = |order: &[usize]| order.len() == from.len() && order.iter().map(|&at| from[at]).eq(to.iter().copied());
    ORDERS.into_iter().filter(move |order| fits(order))
}

/// Calls `see` with each element's bytes in the new order, until it says no.
fn walk<'a>(bytes: &'a [u8], dims: &[i64], order: &[usize], mut see: impl FnMut(&'a [u8]) -> bool) -> bool {
    let dims: Vec<usize> = dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect();
    let count: usize = dims.iter().product();
    if count == 0 || !bytes.len().is_multiple_of(count) {
        return bytes.is_empty();
    }
    let width = bytes.len() / count;
    let stride = |at: usize| dims[at + 1..].iter().product::<usize>() * width;
    let (sizes, strides): (Vec<_>, Vec<_>) = order.iter().map(|&at| (dims[at], stride(at))).unzip();
    let mut place = vec![0; order.len()];
    let mut at = 0;
    for _ in 0..count {
        if !see(&bytes[at..at + width]) {
            return false;
        }
        // Counts up like an odometer, the last dimension fastest.
        for dim in (0..place.len()).rev() {
            place[dim] += 1;
            at += strides[dim];
            if place[dim] < sizes[dim] {
                break;
            }
            at -= sizes[dim] * strides[dim];
            place[dim] = 0;
        }
    }
    true
}

/// The bytes in the order that a part wants.
pub(super) fn ordered<'a>(bytes: &'a [u8], dims: &[i64], order: Option<&[usize]>) -> Cow<'a, [u8]> {
    let Some(order) = order else { return Cow::Borrowed(bytes) };
    let mut moved = Vec::with_capacity(bytes.len());
    walk(bytes, dims, order, |element| {
        moved.extend_from_slice(element);
        true
    });
    Cow::Owned(moved)
}

/// Whether these bytes in that order are those.
pub(super) fn is_ordered(bytes: &[u8], dims: &[i64], order: Option<&[usize]>, wanted: &[u8]) -> bool {
    let Some(order) = order else { return bytes == wanted };
    let mut rest = wanted;
    let all = walk(bytes, dims, order, |element| match rest.split_at_checked(element.len()) {
        Some((next, left)) if next == element => {
            rest = left;
            true
        }
        Some(_) | None => false,
    });
    all && rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_move_as_dimensions_do() {
        let bytes: Vec<u8> = (0..24).collect();
        let moved = ordered(&bytes, &[2, 3, 2], Some(&[0, 2, 1]));
        assert_eq!(moved[..12], [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]);
        assert!(is_ordered(&bytes, &[2, 3, 2], Some(&[0, 2, 1]), &moved));
        assert!(!is_ordered(&bytes, &[2, 3, 2], Some(&[0, 2, 1]), &bytes));
        assert!(!is_ordered(&bytes, &[2, 3, 2], Some(&[0, 2, 1]), &moved[..20]));
        assert_eq!(ordered(&bytes, &[24], None)[..], bytes[..]);
    }

    #[test]
    fn only_orders_that_give_the_shape_are_tried() {
        assert_eq!(orders(&[8, 3, 5, 7], &[8, 5, 7, 3]).collect::<Vec<_>>(), [&[0, 2, 3, 1]]);
        assert_eq!(orders(&[4, 4], &[4, 4]).collect::<Vec<_>>(), [&[1, 0]]);
        assert_eq!(orders(&[4, 2], &[4, 2]).count(), 0);
    }
}
