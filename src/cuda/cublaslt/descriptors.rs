//! cuBLASLt's descriptions of a product, its matrices and what is preferred, destroyed when dropped.

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use crate::cuda::error::{CudaError, Result};
use crate::cuda::gemm::{ColumnMajorMatrix, EpilogueKind, GemmAddresses, GemmDescription, GemmType};

/// A product's descriptors: `d = op(a) op(b)` and what follows, column-major.
pub(super) struct Product {
    pub(super) descriptor: Descriptor,
    pub(super) a: MatrixLayout,
    pub(super) b: MatrixLayout,
    /// Of the addend too.
    pub(super) d: MatrixLayout,
    pub(super) adds: bool,
    pub(super) epilogue: EpilogueKind,
}

impl Product {
    pub(super) fn new(description: &GemmDescription) -> Result<Self> {
        let GemmDescription { gemm, input, output, adds, epilogue } = *description;
        let view = gemm.column_major();
        let descriptor = Descriptor::new()?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        // cublasOperation_t: CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        descriptor.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(view.a.transposed))?;
        descriptor.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(view.b.transposed))?;
        use sys::cublasLtEpilogue_t as Kind;
        let kind = match epilogue {
            EpilogueKind::Nothing => Kind::CUBLASLT_EPILOGUE_DEFAULT,
            EpilogueKind::Bias => Kind::CUBLASLT_EPILOGUE_BIAS,
            EpilogueKind::BiasGeluTanh => Kind::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        };
        descriptor.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(kind as u32))?;
        if epilogue == EpilogueKind::BiasGeluTanh {
            let leading_dimension = view.d.leading_dimension as i64;
            descriptor.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &leading_dimension)?;
        }
        Ok(Self {
            descriptor,
            a: MatrixLayout::new(input, view.a)?,
            b: MatrixLayout::new(input, view.b)?,
            d: MatrixLayout::new(output, view.d)?,
            adds,
            epilogue,
        })
    }

    /// Says where the epilogue's vectors are. The choice of algorithms looks at their alignment.
    pub(super) fn point_at(&self, at: &GemmAddresses) -> Result<()> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        if matches!(self.epilogue, EpilogueKind::Bias | EpilogueKind::BiasGeluTanh) {
            self.descriptor.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &at.bias)?;
        }
        if self.epilogue == EpilogueKind::BiasGeluTanh {
            self.descriptor.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &at.pre)?;
        }
        Ok(())
    }
}

/// A `cublasLtMatmulDesc_t`, destroyed when dropped.
pub(super) struct Descriptor(pub(super) sys::cublasLtMatmulDesc_t);

impl Descriptor {
    /// Sums and factors in f32; not TF32.
    pub(super) fn new() -> Result<Self> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let created = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F);
        Ok(Self(created.map_err(|error| failed("describing a matrix product", error))?))
    }

    pub(super) fn set<T: bytemuck::Pod>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<()> {
        // SAFETY: the descriptor exists; the attribute has this size, which cuBLASLt checks, and is copied.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
        .map_err(|error| failed("describing a matrix product", error))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: created by us and destroyed once. A failure here leaks, which harms nobody; so below.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A `cublasLtMatrixLayout_t`, destroyed when dropped.
pub(super) struct MatrixLayout(pub(super) sys::cublasLtMatrixLayout_t);

impl MatrixLayout {
    pub(super) fn new(of: GemmType, matrix: ColumnMajorMatrix) -> Result<Self> {
        let of = match of {
            GemmType::F32 => sys::cudaDataType::CUDA_R_32F,
            GemmType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let (rows, columns) = (matrix.rows as u64, matrix.columns as u64);
        let created = result::create_matrix_layout(of, rows, columns, matrix.leading_dimension as i64);
        Ok(Self(created.map_err(|error| failed("describing a matrix", error))?))
    }
}

impl Drop for MatrixLayout {
    fn drop(&mut self) {
        // SAFETY: created by us and destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// A `cublasLtMatmulPreference_t`, destroyed when dropped.
pub(super) struct Preference(pub(super) sys::cublasLtMatmulPreference_t);

impl Preference {
    pub(super) fn new() -> Result<Self> {
        Ok(Self(result::create_matmul_pref().map_err(|error| failed("describing what is preferred", error))?))
    }

    pub(super) fn set<T: bytemuck::Pod>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<()> {
        // SAFETY: the preference exists; the attribute has this size, which cuBLASLt checks, and is copied.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
        .map_err(|error| failed("describing what is preferred", error))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by us and destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

pub(super) fn failed(call: &'static str, error: CublasError) -> CudaError {
    CudaError::Call { call, reason: format!("{:?}", error.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::cublaslt::probe;
    use crate::cuda::gemm::{Gemm, Layout};

    /// cuBLASLt, or nothing after saying that the test is skipped.
    fn library() -> bool {
        match probe() {
            Ok(version) => {
                println!("cuBLASLt {version}");
                true
            }
            Err(error) => {
                println!("skipped: {error}");
                false
            }
        }
    }

    fn description(output: GemmType, adds: bool, epilogue: EpilogueKind) -> GemmDescription {
        let gemm = Gemm {
            rows: 50,
            columns: 96,
            depth: 64,
            left: Layout::rows(64),
            right: Layout::transposed(64),
            output_stride: 96,
        };
        GemmDescription { gemm, input: GemmType::Bf16, output, adds, epilogue }
    }

    #[test]
    fn every_product_can_be_described() {
        if !library() {
            return;
        }
        // Descriptors need no device.
        let at = GemmAddresses { output: 256, left: 512, right: 1024, addend: 256, bias: 2048, pre: 4096 };
        for epilogue in [EpilogueKind::Nothing, EpilogueKind::Bias, EpilogueKind::BiasGeluTanh] {
            for output in [GemmType::Bf16, GemmType::F32] {
                for adds in [false, true] {
                    let product = Product::new(&description(output, adds, epilogue)).expect("described");
                    product.point_at(&at).expect("pointed");
                }
            }
        }
        let preference = Preference::new().expect("created");
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(32u64 << 20)).expect("set");
        // A size that is not the attribute's is refused, so the ones above are right.
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &1u16).expect_err("two bytes");
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &2u32).expect("set");
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &16u32).expect("set");
    }
}
