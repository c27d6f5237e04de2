//! The files are opened once for what they say of themselves and for the classes; afterwards a picture costs the page that it
//! is in, of which the latest are kept. So an epoch is shuffled as a whole, and memory does not grow with the files.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::Result as ParquetResult;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::page_index::offset_index::PageLocation;
use parquet::file::serialized_reader::SerializedPageReader;
use tracing::warn;

use super::Request;
use super::columns::{MOST_CLASSES, assign, check_compression, class_names, label_column, picture_column};
use super::file::Positioned;
use super::pages::{self, Place};
use crate::data::decode::{Decoder, guarded};
use crate::data::pictures::{Pictures, SourceOptions};
use crate::{Error, Result};

/// Bytes of pages that are kept.
const KEPT_BYTES: usize = 64 << 20;
/// Pictures in parquet files.
#[derive(Debug)]
struct Parquet {
    decoder: Decoder,
    files: Vec<Table>,
    groups: Vec<Group>,
    count: usize,
    labels: Vec<u32>,
    classes: Option<Vec<String>>,
    kept: Mutex<Kept>,
}

/// A file.
#[derive(Debug)]
struct Table {
    path: PathBuf,
    metadata: ParquetMetaData,
    /// The column with the bytes of pictures.
    column: usize,
    /// The first of its pictures.
    first: usize,
}

/// A row group of a file.
#[derive(Debug)]
struct Group {
    file: usize,
    number: usize,
    /// The first of its pictures.
    first: usize,
    rows: usize,
    pages: OnceLock<std::result::Result<Vec<Place>, String>>,
}

/// The values of a page.
type Values = Arc<Vec<Option<ByteArray>>>;

/// The pages that were read latest.
#[derive(Debug, Default)]
struct Kept {
    pages: HashMap<(usize, usize), (Values, usize, u64)>,
    bytes: usize,
    clock: u64,
}

/// Opens files; what cannot be read is left out with a warning, unless it is all there is.
pub(crate) fn open(request: &Request, options: &SourceOptions) -> Result<Arc<dyn Pictures>> {
    let (mut files, mut groups, mut count): (_, Vec<Group>, _) = (Vec::new(), Vec::new(), 0);
    let (mut labels, mut names) = (Vec::new(), None);
    let mut damaged = None;
    for path in &request.files {
        let inside = |problem: String| request.refuse(format!("{}: {problem}", path.display()));
        let metadata = match metadata(path) {
            Ok(metadata) => metadata,
            Err(problem) => {
                let problem = format!("{}: not a whole parquet file: {problem}", path.display());
                warn!("{problem}; it is left out");
                damaged.get_or_insert(problem);
                continue;
            }
        };
        let schema = metadata.file_metadata().schema_descr();
        let column = picture_column(schema, request.picture.as_deref()).map_err(inside)?;
        let label = label_column(schema, request.label.as_deref()).map_err(inside)?;
        check_compression(&metadata, column, label).map_err(inside)?;
        let first = count;
        let before = groups.len();
        for (number, group) in metadata.row_groups().iter().enumerate() {
            let rows = usize::try_from(group.num_rows()).unwrap_or(0);
            groups.push(Group { file: files.len(), number, first: count, rows, pages: OnceLock::new() });
            count += rows;
        }
        match label {
            Some(label) => {
                let found = guarded(|| read_labels(path, &metadata, label)).map_err(inside)?;
                labels.extend(found);
            }
            None => labels.resize(count, None),
        }
        if labels.len() != count {
            return Err(inside(format!("{} classes for {} rows", labels.len() - first, count - first)));
        }
        let found = label.and_then(|label| class_names(&metadata, &schema.column(label).path().parts()[0]));
        if groups.len() > before && names.is_some() && names != found {
            return Err(inside("the names of the classes differ from those of the files before".to_owned()));
        }
        names = found.or(names);
        files.push(Table { path: path.clone(), metadata, column, first });
    }
    if count == 0 {
        return Err(request.refuse(damaged.unwrap_or_else(|| "there are no rows in it".to_owned())));
    }
    let labels: Option<Vec<u32>> = labels.into_iter().collect();
    let (labels, classes) =
        assign(labels, names, options.classes.as_deref()).map_err(|problem| request.refuse(problem))?;
    let kept = Mutex::default();
    Ok(Arc::new(Parquet { decoder: options.decoder, files, groups, count, labels, classes, kept }))
}

fn metadata(path: &std::path::Path) -> std::result::Result<ParquetMetaData, String> {
    let file = Positioned::open(path).map_err(|error| error.to_string())?;
    guarded(|| ParquetMetaDataReader::new().parse_and_finish(&file).map_err(|error| error.to_string()))
}

/// The class of each row; `None` where there is none, or a number that cannot be one.
fn read_labels(
    path: &std::path::Path,
    metadata: &ParquetMetaData,
    column: usize,
) -> std::result::Result<Vec<Option<u32>>, String> {
    let file = Arc::new(Positioned::open(path).map_err(|error| error.to_string())?);
    let schema = metadata.file_metadata().schema_descr();
    let mut labels = Vec::new();
    for group in metadata.row_groups() {
        let rows = usize::try_from(group.num_rows()).unwrap_or(0);
        let pages = SerializedPageReader::new(Arc::clone(&file), group.column(column), rows, None);
        let descriptor = schema.column(column);
        let most = descriptor.max_def_level();
        let reader = pages.map(|pages| parquet::column::reader::get_column_reader(descriptor, Box::new(pages)));
        let (mut levels, mut numbers): (Vec<i16>, Vec<i64>) = (Vec::new(), Vec::new());
        let read = match reader.map_err(|error| error.to_string())? {
            ColumnReader::Int64ColumnReader(mut reader) => {
                read_all(rows, |left| reader.read_records(left, Some(&mut levels), None, &mut numbers))
            }
            ColumnReader::Int32ColumnReader(mut reader) => {
                let mut short: Vec<i32> = Vec::new();
                let read = read_all(rows, |left| reader.read_records(left, Some(&mut levels), None, &mut short));
                numbers.extend(short.into_iter().map(i64::from));
                read
            }
            _ => return Err("classes must be whole numbers".to_owned()),
        };
        read.map_err(|error| format!("the classes cannot be read: {error}"))?;
        let mut numbers = numbers.into_iter();
        for at in 0..rows {
            // Columns that cannot be empty have no levels.
            let there = most == 0 || levels.get(at).is_some_and(|level| *level == most);
            let number = if there { numbers.next() } else { None };
            labels.push(number.filter(|number| (0..MOST_CLASSES).contains(number)).map(|number| number as u32));
        }
    }
    Ok(labels)
}

fn read_all(
    rows: usize,
    mut read: impl FnMut(usize) -> ParquetResult<(usize, usize, usize)>,
) -> std::result::Result<(), String> {
    let mut done = 0;
    while done < rows {
        match read(rows - done).map_err(|error| error.to_string())?.0 {
            0 => return Err(format!("it ends after {done} of {rows} rows")),
            records => done += records,
        }
    }
    Ok(())
}

impl Parquet {
    /// The bytes of a picture.
    fn value(&self, index: usize) -> std::result::Result<ByteArray, String> {
        let number = self.groups.partition_point(|group| group.first <= index).saturating_sub(1);
        let group = self.groups.get(number).ok_or_else(|| "there is no such row".to_owned())?;
        let row = index - group.first;
        let pages = group.pages.get_or_init(|| guarded(|| self.find_pages(group))).as_ref().map_err(String::clone)?;
        let at = pages.partition_point(|page| page.first <= row).saturating_sub(1);
        let page = pages.get(at).ok_or_else(|| "there is no such row".to_owned())?;
        // Not in the match, which would keep the lock.
        let kept = self.kept().get((number, at));
        let values = match kept {
            Some(values) => values,
            None => {
                let (values, bytes) = guarded(|| self.read_page(group, pages, at))?;
                let values = Arc::new(values);
                self.kept().put((number, at), Arc::clone(&values), bytes);
                values
            }
        };
        match values.get(row - page.first) {
            Some(Some(value)) => Ok(value.clone()),
            Some(None) => Err("the row has no picture in it (its bytes are null)".to_owned()),
            None => Err("its page has fewer rows than it says".to_owned()),
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find_pages(&self, group: &Group) -> std::result::Result<Vec<Place>, String> {
        let table = &self.files[group.file];
        let file = Positioned::open(&table.path).map_err(|error| error.to_string())?;
        let (start, length) = table.metadata.row_group(group.number).column(table.column).byte_range();
        pages::find(|at| Ok(file.at(at)), (start, start.saturating_add(length)), group.rows)
    }

    /// The values of a page, and how many bytes they keep in memory.
    fn read_page(
        &self,
        group: &Group,
        pages: &[Place],
        at: usize,
    ) -> std::result::Result<(Vec<Option<ByteArray>>, usize), String> {
        let text = |error: parquet::errors::ParquetError| error.to_string();
        let table = &self.files[group.file];
        let file = Arc::new(Positioned::open(&table.path).map_err(|error| error.to_string())?);
        let chunk = table.metadata.row_group(group.number).column(table.column);
        let location = |page: &Place| PageLocation {
            offset: page.offset as i64,
            compressed_page_size: page.bytes,
            first_row_index: page.first as i64,
        };
        let page = &pages[at];
        // What lies before the first page is the dictionary.
        let dictionary = page.dictionary && pages[0].offset > chunk.byte_range().0;
        let locations = if at > 0 { vec![location(&pages[0]), location(page)] } else { vec![location(page)] };
        let count = locations.len();
        let reader = SerializedPageReader::new(file, chunk, group.rows, Some(locations)).map_err(text)?;
        let mut prepared = Prepared { pages: Vec::new(), reader };
        if pages[0].offset > chunk.byte_range().0 {
            if dictionary {
                prepared.load()?;
            } else {
                prepared.reader.skip_next_page().map_err(text)?;
            }
        }
        if count == 2 {
            prepared.reader.skip_next_page().map_err(text)?;
        }
        prepared.load()?;
        let bytes = prepared.pages.iter().map(|page| page.buffer().len()).sum();
        let rows = pages.get(at + 1).map_or(group.rows, |next| next.first) - page.first;
        // Read from the back.
        prepared.pages.reverse();

        let descriptor = table.metadata.file_metadata().schema_descr().column(table.column);
        let most = descriptor.max_def_level();
        let mut reader = ColumnReaderImpl::<ByteArrayType>::new(descriptor, Box::new(prepared));
        let (mut levels, mut found): (Vec<i16>, Vec<ByteArray>) = (Vec::new(), Vec::new());
        read_all(rows, |left| reader.read_records(left, Some(&mut levels), None, &mut found))?;
        let mut found = found.into_iter();
        let there = |row: usize| most == 0 || levels.get(row).is_some_and(|level| *level == most);
        Ok(((0..rows).map(|row| if there(row) { found.next() } else { None }).collect(), bytes))
    }
}

impl Pictures for Parquet {
    fn len(&self) -> usize {
        self.count
    }

    fn channels(&self) -> usize {
        self.decoder.channels()
    }

    fn name(&self, index: usize) -> PathBuf {
        let at = self.files.partition_point(|table| table.first <= index).saturating_sub(1);
        self.files.get(at).map_or_else(PathBuf::new, |table| table.path.join(format!("{:06}", index - table.first)))
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labels.get(index).copied()
    }

    fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    /// That of the pictures of its row group together: a page would have to be read to know more.
    fn file_size(&self, index: usize) -> Result<Option<u64>> {
        let number = self.groups.partition_point(|group| group.first <= index).saturating_sub(1);
        Ok(self.groups.get(number).map(|group| {
            let table = &self.files[group.file];
            table.metadata.row_group(group.number).column(table.column).byte_range().1
        }))
    }

    fn read_file(&self, index: usize, buffer: &mut Vec<u8>) -> Result<Option<Decoder>> {
        let bytes = self.value(index).map_err(|problem| Error::Picture { path: self.name(index), problem })?;
        buffer.clear();
        buffer.extend_from_slice(bytes.data());
        Ok(Some(self.decoder))
    }
}

impl Kept {
    fn get(&mut self, key: (usize, usize)) -> Option<Values> {
        self.clock += 1;
        let (values, _, used) = self.pages.get_mut(&key)?;
        *used = self.clock;
        Some(Arc::clone(values))
    }

    fn put(&mut self, key: (usize, usize), values: Values, bytes: usize) {
        self.bytes += bytes;
        if let Some((_, before, _)) = self.pages.insert(key, (values, bytes, self.clock)) {
            self.bytes -= before;
        }
        while self.bytes > KEPT_BYTES && self.pages.len() > 1 {
            let oldest = self.pages.iter().filter(|(other, _)| **other != key).min_by_key(|(_, (_, _, used))| *used);
            let Some(oldest) = oldest.map(|(key, _)| *key) else { return };
            if let Some((_, bytes, _)) = self.pages.remove(&oldest) {
                self.bytes -= bytes;
            }
        }
    }
}

/// Pages that were chosen, for the reader of columns.
struct Prepared {
    pages: Vec<Page>,
    reader: SerializedPageReader<Positioned>,
}

impl Prepared {
    fn load(&mut self) -> std::result::Result<(), String> {
        let page = self.reader.get_next_page().map_err(|error| error.to_string())?;
        self.pages.push(page.ok_or_else(|| "its page is not there".to_owned())?);
        Ok(())
    }
}

impl Iterator for Prepared {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Prepared {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        Ok(self.pages.pop())
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        Ok(None)
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.pages.pop();
        Ok(())
    }
}
