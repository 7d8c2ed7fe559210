//! Ranges by number: places that are used again under other numbers.

use crate::{DeviceError, RangeId};

/// Bits of a [`RangeId`] that are its place in the table; the others count how often the place was used.
const INDEX_BITS: u32 = 14;
/// Most ranges that a device can have reserved.
pub const RANGES_MAX: usize = 1 << INDEX_BITS;

/// What a device knows of its ranges.
pub(crate) struct Table<T> {
    /// By place; the id tells whether it is the range that is asked for.
    places: Vec<(RangeId, Option<T>)>,
    unused: Vec<usize>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { places: Vec::new(), unused: Vec::new() }
    }
}

impl<T> Table<T> {
    pub(crate) fn get(&mut self, id: RangeId) -> Result<&mut T, DeviceError> {
        match self.places.get_mut(place(id)) {
            Some((found, Some(range))) if *found == id => Ok(range),
            Some(_) | None => Err(DeviceError::State { range: id, state: "not reserved", wanted: "reserved" }),
        }
    }

    pub(crate) fn insert(&mut self, range: T) -> Result<RangeId, DeviceError> {
        let index = match self.unused.pop() {
            Some(index) => index,
            None if self.places.len() < RANGES_MAX => {
                let index = self.places.len();
                self.places.push((RangeId(u32::try_from(index).expect("there are few places")), None));
                index
            }
            None => return Err(DeviceError::Invalid("the device has as many ranges as it can have")),
        };
        let (id, at) = &mut self.places[index];
        *at = Some(range);
        Ok(*id)
    }

    /// Forgets a range; its id will not be used again soon.
    pub(crate) fn remove(&mut self, id: RangeId) -> Option<T> {
        let (found, range) = self.places.get_mut(place(id))?;
        let removed = range.take_if(|_| *found == id)?;
        found.0 = id.0.wrapping_add(1 << INDEX_BITS);
        self.unused.push(place(id));
        Some(removed)
    }
}

/// A range's place in tables of [`RANGES_MAX`] places.
pub(crate) fn place(id: RangeId) -> usize {
    usize::try_from(id.0).unwrap_or(usize::MAX) & (RANGES_MAX - 1)
}
