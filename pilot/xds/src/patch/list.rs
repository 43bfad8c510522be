//! Operations on lists of filters and routes.

use mesh_model::authored::PatchOperation;

use super::{Did, Res};

/// Changes a list at the member that is matched. `matched` is `None` if the patch matches no member in particular.
///
/// Several members may match a removal; the other operations are at the first.
pub(super) fn change<T: Clone>(
    list: &mut Vec<T>,
    operation: PatchOperation,
    matched: Option<&dyn Fn(&T) -> bool>,
    made: impl FnOnce() -> Result<T, String>,
    end: impl FnOnce(&[T]) -> usize,
) -> Res {
    let at = matched.and_then(|m| list.iter().position(m));
    let place = match (operation, matched.is_some(), at) {
        (PatchOperation::Add, ..) | (PatchOperation::InsertAfter, false, _) => end(list),
        (PatchOperation::InsertFirst, ..) | (PatchOperation::InsertBefore, false, _) => 0,
        (PatchOperation::InsertBefore, true, Some(i)) => i,
        (PatchOperation::InsertAfter, true, Some(i)) => i + 1,
        (PatchOperation::Replace, true, Some(i)) => {
            list[i] = made()?;
            return Ok(Did::Changed);
        }
        (PatchOperation::Remove, true, Some(_)) => {
            if let Some(m) = matched {
                list.retain(|x| !m(x));
            }
            return Ok(Did::Changed);
        }
        _ => return Ok(Did::Nothing),
    };
    list.insert(place.min(list.len()), made()?);
    Ok(Did::Changed)
}
