//! From scores to labels.

use faaswap_protocol::DType;
use half::f16;
use serde::Serialize;

use super::Postprocess;
use crate::broker::OutputTensor;

/// One label that fits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Label {
    /// Its name.
    pub label: String,
    /// How well.
    pub score: f64,
    /// Its position in the output.
    pub index: usize,
}

/// Scores that are none.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// A type without fractions.
    #[error("scores are FP32, FP16 or FP64, the output is {0}")]
    Type(DType),
    /// More than one row of scores.
    #[error("scores of one image are one row, the output has the shape {0}")]
    Rows(faaswap_protocol::Shape),
    /// Nothing can be put in order.
    #[error("the model answered with a score that is no number, for index {0}")]
    NoNumber(usize),
}

/// The labels with the highest scores, best first; among equals the first in the output.
pub fn best(settings: &Postprocess, output: &OutputTensor) -> Result<Vec<Label>, LabelError> {
    // A height and width of 1 may be left of pooling, before the scores or behind.
    if output.shape.dims().iter().filter(|dim| **dim != 1).count() > 1 {
        return Err(LabelError::Rows(output.shape.clone()));
    }
    let mut scores = numbers(output.dtype, &output.data)?;
    if let Some(at) = scores.iter().position(|score| score.is_nan()) {
        return Err(LabelError::NoNumber(at));
    }
    if settings.softmax {
        softmax(&mut scores);
    }
    let mut order: Vec<_> = scores.into_iter().enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    order.truncate(settings.top);
    let label = |index: usize| settings.labels.get(index).cloned().unwrap_or_else(|| index.to_string());
    Ok(order.into_iter().map(|(index, score)| Label { label: label(index), score, index }).collect())
}

fn numbers(dtype: DType, data: &[u8]) -> Result<Vec<f64>, LabelError> {
    if dtype == DType::F32 {
        Ok(data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes).into()).collect())
    } else if dtype == DType::F16 {
        Ok(data.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes).into()).collect())
    } else if dtype == DType::F64 {
        Ok(data.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
    } else {
        Err(LabelError::Type(dtype))
    }
}

fn softmax(scores: &mut [f64]) {
    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // Several infinite ones share all of it.
    let weight = |score: f64| if score == highest { 1.0 } else { (score - highest).exp() };
    let sum: f64 = scores.iter().map(|score| weight(*score)).sum();
    scores.iter_mut().for_each(|score| *score = weight(*score) / sum);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use faaswap_protocol::Shape;

    use super::*;

    fn output(dims: &[u64], scores: &[f32]) -> OutputTensor {
        let data = scores.iter().flat_map(|score| score.to_le_bytes()).collect::<Vec<_>>().into();
        OutputTensor { index: 0, dtype: DType::F32, shape: Shape::new(dims).unwrap(), data }
    }

    fn settings(softmax: bool) -> Postprocess {
        Postprocess { output: None, labels: vec!["cat".into(), "dog".into()], top: 2, softmax }
    }

    #[test]
    fn the_best_come_first_and_an_index_without_a_name_is_its_own() {
        let best = best(&settings(false), &output(&[1, 3], &[0.5, 1.0, 1.0])).unwrap();
        let shown: Vec<_> = best.iter().map(|label| (label.label.as_str(), label.score, label.index)).collect();
        assert_eq!(shown, [("dog", 1.0, 1), ("2", 1.0, 2)]);
    }

    #[test]
    fn softmax_sums_up_to_one_whatever_the_scores_are() {
        for scores in [[1000.0, 0.0, -1000.0], [f32::NEG_INFINITY; 3], [f32::INFINITY, 1.0, f32::INFINITY]] {
            let all = Postprocess { top: 9, ..settings(true) };
            let sum: f64 = best(&all, &output(&[3], &scores)).unwrap().iter().map(|label| label.score).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{scores:?}: {sum}");
        }
    }

    #[test]
    fn what_is_not_one_row_of_numbers_is_refused() {
        let nan = best(&settings(false), &output(&[1, 2], &[0.0, f32::NAN]));
        assert!(matches!(nan, Err(LabelError::NoNumber(1))), "{nan:?}");
        let rows = best(&settings(false), &output(&[2, 2], &[0.0; 4]));
        assert!(matches!(rows, Err(LabelError::Rows(_))), "{rows:?}");
        assert_eq!(best(&settings(false), &output(&[1, 2, 1, 1], &[0.0; 2])).unwrap().len(), 2);
        assert_eq!(best(&settings(false), &output(&[1, 0], &[])).unwrap(), []);
    }
}
