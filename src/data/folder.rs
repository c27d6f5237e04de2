//! Folders of pictures.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use tracing::info;

use crate::data::decode::Decoder;
use crate::data::pictures::{PICTURE_EXTENSIONS, Pictures, SourceOptions};
use crate::{Error, Result};

/// Files by folder: a million names take a few tens of megabytes.
#[derive(Debug)]
pub(crate) struct Folder {
    decoder: Decoder,
    folders: Vec<Directory>,
    files: Vec<(u32, Box<OsStr>)>,
    classes: Option<Vec<String>>,
}

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    label: u32,
}

impl Folder {
    /// Finds the pictures below `root`, sorted by path.
    pub(crate) fn open(root: &Path, options: &SourceOptions) -> Result<Self> {
        let refuse = |problem: String| Error::Data { source_name: root.display().to_string(), problem };
        let mut scan = Scan::default();
        scan.visit(root, &mut Vec::new(), None)?;
        if scan.files.is_empty() {
            let found = if scan.others.is_empty() { "nothing".to_owned() } else { scan.others() };
            return Err(refuse(format!(
                "no pictures in this folder or below; looked for .{} in upper or lower case, found {found}. \
                 Hidden names are skipped",
                PICTURE_EXTENSIONS.join(", .")
            )));
        }
        if !scan.others.is_empty() {
            let count: usize = scan.others.values().sum();
            info!(
                "{}: {count} files are left out, whose names are not those of pictures: {}",
                root.display(),
                scan.others()
            );
        }
        let mut folder = Self { decoder: options.decoder, folders: scan.folders, files: scan.files, classes: None };
        // Pictures beside the sub-folders: those are not classes then.
        if folder.files.iter().all(|(at, _)| folder.folders[*at as usize].label != u32::MAX) {
            folder.assign_labels(&scan.classes, options.classes.as_deref()).map_err(refuse)?;
        } else if options.classes.is_some() {
            return Err(refuse("labels are needed, and come from class sub-folders; pictures lie beside them".into()));
        }
        Ok(folder)
    }

    /// Turns the numbers of first-level folders into labels: classes without a picture do not count.
    fn assign_labels(&mut self, names: &[OsString], wanted: Option<&[String]>) -> std::result::Result<(), String> {
        let mut used = vec![false; names.len()];
        for (at, _) in &self.files {
            used[self.folders[*at as usize].label as usize] = true;
        }
        let mut classes: Vec<String> = Vec::new();
        let mut labels = vec![u32::MAX; names.len()];
        for (number, name) in names.iter().enumerate().filter(|(number, _)| used[*number]) {
            let name = name.to_string_lossy().into_owned();
            match wanted {
                Some(wanted) => match wanted.iter().position(|class| *class == name) {
                    Some(position) => labels[number] = position as u32,
                    None => return Err(format!("the sub-folder {name} is not one of the {} classes", wanted.len())),
                },
                None => {
                    labels[number] = classes.len() as u32;
                    classes.push(name);
                }
            }
        }
        for folder in self.folders.iter_mut().filter(|folder| folder.label != u32::MAX) {
            folder.label = labels[folder.label as usize];
        }
        self.classes = Some(wanted.map_or(classes, <[String]>::to_vec));
        Ok(())
    }

    /// These files, without labels.
    pub(crate) fn of_files(paths: &[PathBuf], options: &SourceOptions) -> Self {
        let mut folders: Vec<Directory> = Vec::new();
        let mut files = Vec::with_capacity(paths.len());
        for path in paths {
            let parent = path.parent().unwrap_or(Path::new(""));
            if folders.last().is_none_or(|folder| folder.path != parent) {
                folders.push(Directory { path: parent.to_path_buf(), label: u32::MAX });
            }
            let name = path.file_name().unwrap_or(path.as_os_str());
            files.push(((folders.len() - 1) as u32, name.into()));
        }
        Self { decoder: options.decoder, folders, files, classes: None }
    }

    fn path(&self, index: usize) -> PathBuf {
        match self.files.get(index) {
            Some((at, name)) => self.folders[*at as usize].path.join(&**name),
            None => PathBuf::new(),
        }
    }
}

impl Pictures for Folder {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn channels(&self) -> usize {
        self.decoder.channels()
    }

    fn name(&self, index: usize) -> PathBuf {
        self.path(index)
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.classes.as_ref()?;
        self.files.get(index).map(|(at, _)| self.folders[*at as usize].label)
    }

    fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    fn file_size(&self, index: usize) -> Result<Option<u64>> {
        self.decoder.file_size(&self.path(index)).map(Some)
    }

    fn read_file(&self, index: usize, buffer: &mut Vec<u8>) -> Result<Option<Decoder>> {
        self.decoder.read_file(&self.path(index), buffer)?;
        Ok(Some(self.decoder))
    }
}

/// What a walk through a folder has found.
#[derive(Default)]
struct Scan {
    folders: Vec<Directory>,
    files: Vec<(u32, Box<OsStr>)>,
    classes: Vec<OsString>,
    /// Extensions of what is not a picture, for the message about an empty folder.
    others: BTreeMap<String, usize>,
}

impl Scan {
    /// What is not a picture, by the commonest extensions.
    fn others(&self) -> String {
        let mut others: Vec<(&String, &usize)> = self.others.iter().collect();
        others.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let most = others.iter().take(8).map(|(extension, count)| match extension.as_str() {
            "" => format!("{count} without an extension"),
            extension => format!("{count} .{extension}"),
        });
        let mut text = most.collect::<Vec<_>>().join(", ");
        if others.len() > 8 {
            text.push_str(", …");
        }
        text
    }

    /// `above` are the real paths of the folders that this one lies in: a link to one of them would never end.
    fn visit(&mut self, path: &Path, above: &mut Vec<PathBuf>, class: Option<u32>) -> Result<()> {
        let unreadable = |error| Error::io("listing", path, error);
        let real = fs::canonicalize(path).map_err(unreadable)?;
        if above.contains(&real) {
            return Ok(());
        }
        let mut folders = Vec::new();
        let mut files = Vec::new();
        for entry in fs::read_dir(path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let kind = entry.file_type().map_err(unreadable)?;
            // A link that leads nowhere is a picture that cannot be read, if it is called one.
            let is_folder = kind.is_dir() || (kind.is_symlink() && entry.path().is_dir());
            if is_folder {
                folders.push(name);
            } else if is_picture(&name) {
                files.push(name);
            } else {
                let extension = Path::new(&name).extension().unwrap_or_default();
                *self.others.entry(extension.to_string_lossy().into_owned()).or_default() += 1;
            }
        }
        folders.sort();
        files.sort();
        if !files.is_empty() {
            let at = self.folders.len() as u32;
            self.folders.push(Directory { path: path.to_path_buf(), label: class.unwrap_or(u32::MAX) });
            self.files.extend(files.into_iter().map(|name| (at, name.into_boxed_os_str())));
        }
        above.push(real);
        for name in folders {
            let inner = path.join(&name);
            let class = class.unwrap_or_else(|| {
                self.classes.push(name);
                (self.classes.len() - 1) as u32
            });
            self.visit(&inner, above, Some(class))?;
        }
        above.pop();
        Ok(())
    }
}

fn is_picture(name: &OsStr) -> bool {
    Path::new(name).extension().is_some_and(|found| {
        PICTURE_EXTENSIONS.iter().any(|known| found.as_encoded_bytes().eq_ignore_ascii_case(known.as_bytes()))
    })
}
