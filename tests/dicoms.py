"""Write small synthetic DICOM files for tests."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

from medbudget.data.folder import prepare_folder
from medbudget.data.prepare import BrokenCase
from medbudget.data.volumes import find_sources, read_pixels

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
CR = "1.2.840.10008.5.1.4.1.1.1"
SC = "1.2.840.10008.5.1.4.1.1.7"
US = "1.2.840.10008.5.1.4.1.1.6.1"
PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
ENHANCED = "1.2.840.10008.5.1.4.1.1.4.1"
AXIAL = [1, 0, 0, 0, 1, 0]
CORONAL = [1, 0, 0, 0, 0, -1]


def item(**tags):
    """Make a dataset, for a sequence."""
    data = Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def write(
    path, pixels, *, sop=MR, syntax=ExplicitVRLittleEndian, patient="P1", series=None, keep=None,
    **tags,
):  # fmt: skip
    """Write pixels ``([frames,] H, W[, 3])``; a tag of None is left out, `keep` bytes are kept."""
    warnings.filterwarnings("ignore", module="pydicom")
    pixels, path = np.asarray(pixels), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop, generate_uid()
    meta.TransferSyntaxUID = syntax
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    data = FileDataset(str(path), {}, b"\0" * 128, meta, implicit, little)
    data.SOPClassUID, data.SOPInstanceUID = sop, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.3", series or generate_uid()
    data.PatientID, data.PatientName, data.Modality = patient, "X", "OT"
    colour = pixels.ndim >= 3 and pixels.shape[-1] == 3
    shape = pixels.shape[:-1] if colour else pixels.shape
    if len(shape) == 3:
        data.NumberOfFrames = shape[0]
    data.Rows, data.Columns = shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()[:keep]
    data.PixelData = content + b"\0" * (len(content) % 2)
    for name, value in tags.items():
        if value is not None:
            setattr(data, name, value)
        elif name in data:
            delattr(data, name)
    data.save_as(path, enforce_file_format=True)
    return path


def repack(path, fragments, syntax, **tags):
    """Replace a file's pixels by encapsulated fragments, without offsets."""
    data = pydicom.dcmread(path)
    body = b"\xfe\xff\x00\xe0\0\0\0\0"
    for fragment in fragments:
        fragment += b"\0" * (len(fragment) % 2)
        body += b"\xfe\xff\x00\xe0" + len(fragment).to_bytes(4, "little") + fragment
    data.PixelData = body
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = syntax
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


def read_one(root, **options):
    """Read the only source of a folder."""
    sources = find_sources(root)
    assert len(sources) == 1, [source.files for source in sources]
    return read_pixels(root, sources[0], **options)


def read_or_refuse(root, **options):
    """Return the values of the only source, or the reason why it is refused."""
    try:
        return read_one(root, **options).values
    except BrokenCase as error:
        return str(error)


def prepare(root, out, **options):
    """Prepare a folder without splits."""
    return prepare_folder(root, out, **{"proportions": [1], "size": 64, **options})


def read_row(out):
    """Return the first row of a prepared folder's manifest."""
    with open(out / "manifest.csv", newline="", encoding="utf-8") as file:
        return next(csv.DictReader(file))


def shown(out):
    """Return the only prepared image, in gray."""
    return np.asarray(Image.open(next(out.rglob("p*.png"))))[..., 0]
