//! What the API server asks, and what it is told: `AdmissionReview` of `admission.k8s.io/v1`.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    inject,
    limits::MISTAKES_SHOWN_MAX,
    settings::{OnMistake, Settings},
    telemetry::{Outcome, Telemetry},
    wish::{self, Verdict},
};

/// A review, asked or answered.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Review {
    /// `admission.k8s.io/v1`.
    pub api_version: String,
    /// `AdmissionReview`.
    pub kind: String,
    /// What is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Question>,
    /// What is answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<Answer>,
}

/// What is asked.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Question {
    /// Comes back in the answer.
    pub uid: String,
    /// Where the pod will be; it does not say so itself yet.
    #[serde(default)]
    pub namespace: String,
    /// The pod.
    pub object: Value,
}

/// What is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// The question's.
    pub uid: String,
    /// Whether the pod may be made.
    pub allowed: bool,
    /// `JSONPatch`, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_type: Option<String>,
    /// The changes, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<String>,
    /// Why the pod may not be made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// What whoever makes it is shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Status {
    /// As in HTTP.
    pub code: u16,
    /// In words.
    pub message: String,
}

/// A body that is no question.
#[derive(Debug, thiserror::Error)]
pub enum NoQuestion {
    /// It is no JSON of that shape.
    #[error("the body is no AdmissionReview: {0}")]
    Shape(#[from] serde_json::Error),
    /// Another kind or version.
    #[error("{0} {1} is not admission.k8s.io/v1 AdmissionReview")]
    Kind(String, String),
    /// A review that asks nothing.
    #[error("the review has no request")]
    Empty,
}

/// Answers one review.
pub fn answer(body: &[u8], settings: &Settings, telemetry: &Telemetry) -> Result<Review, NoQuestion> {
    let review: Review = serde_json::from_slice(body)?;
    if review.api_version != "admission.k8s.io/v1" || review.kind != "AdmissionReview" {
        return Err(NoQuestion::Kind(review.api_version, review.kind));
    }
    let question = review.request.ok_or(NoQuestion::Empty)?;
    let response = Some(decide(&question, settings, telemetry));
    Ok(Review { api_version: review.api_version, kind: review.kind, request: None, response })
}

fn decide(question: &Question, settings: &Settings, telemetry: &Telemetry) -> Answer {
    let (uid, pod) = (question.uid.clone(), &question.object);
    let verdict = wish::read(&inject::texts(pod, "annotations"), &inject::texts(pod, "labels"));
    let mistakes = match verdict {
        Verdict::Nothing => {
            telemetry.reviewed(Outcome::untouched);
            return Answer { uid, allowed: true, ..Answer::default() };
        }
        Verdict::Wish(wish) => match inject::inject(pod, &question.namespace, &wish, settings) {
            Ok(changed) => return patched(uid, pod, &changed, telemetry),
            Err(error) => vec![error.to_string()],
        },
        Verdict::Mistakes(mistakes) => mistakes,
    };
    let shown = mistakes.iter().take(MISTAKES_SHOWN_MAX).cloned().collect::<Vec<_>>();
    let message = format!("faaswap: {}", shown.join("; "));
    tracing::warn!(namespace = %question.namespace, pod = %pod["metadata"]["generateName"], message, "annotations are wrong");
    match settings.on_mistake {
        OnMistake::Deny => {
            telemetry.reviewed(Outcome::denied);
            Answer { uid, status: Some(Status { code: 422, message }), ..Answer::default() }
        }
        OnMistake::Ignore => {
            telemetry.reviewed(Outcome::ignored);
            Answer { uid, allowed: true, warnings: shown, ..Answer::default() }
        }
    }
}

fn patched(uid: String, pod: &Value, changed: &Value, telemetry: &Telemetry) -> Answer {
    let patch = json_patch::diff(pod, changed);
    if patch.0.is_empty() {
        telemetry.reviewed(Outcome::untouched);
        return Answer { uid, allowed: true, ..Answer::default() };
    }
    // A patch is a list of paths and JSON: it can always be written.
    let text = serde_json::to_vec(&patch).unwrap_or_default();
    telemetry.reviewed(Outcome::injected);
    tracing::info!(function = %changed["metadata"]["annotations"][wish::STATUS], "injected");
    Answer {
        uid,
        allowed: true,
        patch_type: Some("JSONPatch".to_owned()),
        patch: Some(STANDARD.encode(text)),
        ..Answer::default()
    }
}
