//! Always denies.

use std::time::Duration;

use mesh_model::authored::DenierParams;

use super::CheckResult;

const FAILED_PRECONDITION: i32 = 9;

#[derive(Debug)]
pub(crate) struct Denier(CheckResult);

impl Denier {
    pub(super) fn new(p: &DenierParams) -> Self {
        let status = p.status.as_ref();
        Self(CheckResult {
            code: status.map_or(FAILED_PRECONDITION, |s| s.code),
            message: status.map(|s| s.message.clone()).unwrap_or_default(),
            valid: p.valid_duration.map_or(Duration::from_secs(5), |d| d.0),
            uses: p.valid_use_count.unwrap_or(1_000),
        })
    }

    pub(super) fn check(&self) -> CheckResult {
        self.0.clone()
    }
}
