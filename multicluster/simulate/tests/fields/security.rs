use crate::Row;
pub(crate) fn rows() -> Vec<Row> {
    vec![]
}
