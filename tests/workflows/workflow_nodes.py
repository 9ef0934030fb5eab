"""The sockets and widgets of the nodes that the graphs in workflows/ use."""

# widgets of both AdaSpa Attention nodes
SETTINGS = (
    "preset:COMBO sparsity:FLOAT block_size:COMBO warmup:FLOAT search_points:STRING "
    "head_adaptive:BOOLEAN dense_layers:STRING start_percent:FLOAT end_percent:FLOAT "
    "min_tokens:INT cache:COMBO dense_attention:COMBO enabled:BOOLEAN precision:COMBO "
    "recall:FLOAT tail:COMBO token_order:COMBO"
)

# type: (sockets, widgets, outputs), each "name:TYPE"; "?" marks a socket that may stay empty,
# "~" a space
NODES = {
    "AdaSpaAttention": (
        "model:MODEL",
        SETTINGS,
        "model:MODEL adaspa:ADASPA",
    ),
    "AdaSpaAttentionPair": (
        "model_high:MODEL model_low:MODEL",
        SETTINGS,
        "model_high:MODEL model_low:MODEL adaspa:ADASPA",
    ),
    "AdaSpaReport": (
        "samples:LATENT adaspa:ADASPA?",
        "layer:INT head:INT",
        "samples:LATENT picture:IMAGE text:STRING",
    ),
    "BasicGuider": (
        "model:MODEL conditioning:CONDITIONING",
        "",
        "GUIDER:GUIDER",
    ),
    "BasicScheduler": ("model:MODEL", "scheduler:COMBO steps:INT denoise:FLOAT", "SIGMAS:SIGMAS"),
    "CFGGuider": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING",
        "cfg:FLOAT",
        "GUIDER:GUIDER",
    ),
    "CLIPLoader": ("", "clip_name:COMBO type:COMBO device:COMBO", "CLIP:CLIP"),
    "CLIPTextEncode": ("clip:CLIP", "text:STRING", "CONDITIONING:CONDITIONING"),
    "CLIPVisionEncode": (
        "clip_vision:CLIP_VISION image:IMAGE",
        "crop:COMBO",
        "CLIP_VISION_OUTPUT:CLIP_VISION_OUTPUT",
    ),
    "CLIPVisionLoader": (
        "",
        "clip_name:COMBO",
        "CLIP_VISION:CLIP_VISION",
    ),
    "CheckpointLoaderSimple": (
        "",
        "ckpt_name:COMBO",
        "MODEL:MODEL CLIP:CLIP VAE:VAE",
    ),
    "CreateVideo": ("images:IMAGE audio:AUDIO?", "fps:FLOAT bit_depth:INT", "VIDEO:VIDEO"),
    "DualCLIPLoader": (
        "",
        "clip_name1:COMBO clip_name2:COMBO type:COMBO device:COMBO",
        "CLIP:CLIP",
    ),
    "EmptyHunyuanLatentVideo": (
        "",
        "width:INT height:INT length:INT batch_size:INT",
        "LATENT:LATENT",
    ),
    "EmptyHunyuanVideo15Latent": (
        "",
        "width:INT height:INT length:INT batch_size:INT",
        "LATENT:LATENT",
    ),
    "EmptyLTXVLatentVideo": (
        "",
        "width:INT height:INT length:INT batch_size:INT",
        "LATENT:LATENT",
    ),
    "HunyuanVideo15ImageToVideo": (
        "positive:CONDITIONING negative:CONDITIONING vae:VAE "
        "start_image:IMAGE? clip_vision_output:CLIP_VISION_OUTPUT?",
        "width:INT height:INT length:INT batch_size:INT",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT",
    ),
    "GetVideoComponents": (
        "video:VIDEO",
        "",
        "images:IMAGE audio:AUDIO fps:FLOAT bit_depth:INT",
    ),
    "ImageScale": (
        "image:IMAGE",
        "upscale_method:COMBO width:INT height:INT crop:COMBO",
        "IMAGE:IMAGE",
    ),
    "KSampler": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "seed:INT steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO denoise:FLOAT",
        "LATENT:LATENT",
    ),
    "KSamplerAdvanced": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "add_noise:COMBO noise_seed:INT steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO "
        "start_at_step:INT end_at_step:INT return_with_leftover_noise:COMBO",
        "LATENT:LATENT",
    ),
    "KSamplerSelect": ("", "sampler_name:COMBO", "SAMPLER:SAMPLER"),
    "Kandinsky5ImageToVideo": (
        "positive:CONDITIONING negative:CONDITIONING vae:VAE start_image:IMAGE?",
        "width:INT height:INT length:INT batch_size:INT",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT cond_latent:LATENT",
    ),
    "LTXAVTextEncoderLoader": (
        "",
        "text_encoder:COMBO ckpt_name:COMBO device:COMBO",
        "CLIP:CLIP",
    ),
    "LTXVAudioVAEDecode": (
        "samples:LATENT audio_vae:VAE",
        "",
        "Audio:AUDIO",
    ),
    "LTXVAudioVAELoader": (
        "",
        "ckpt_name:COMBO",
        "Audio~VAE:VAE",
    ),
    "LTXVConcatAVLatent": (
        "video_latent:LATENT audio_latent:LATENT",
        "",
        "latent:LATENT",
    ),
    "LTXVConditioning": (
        "positive:CONDITIONING negative:CONDITIONING",
        "frame_rate:FLOAT",
        "positive:CONDITIONING negative:CONDITIONING",
    ),
    "LTXVCropGuides": (
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT",
        "",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT",
    ),
    "LTXVEmptyLatentAudio": (
        "audio_vae:VAE",
        "frames_number:INT frame_rate:FLOAT,INT batch_size:INT",
        "Latent:LATENT",
    ),
    "LTXVImgToVideoInplace": (
        "vae:VAE image:IMAGE latent:LATENT",
        "strength:FLOAT bypass:BOOLEAN",
        "latent:LATENT",
    ),
    "LTXVLatentUpsampler": (
        "samples:LATENT upscale_model:LATENT_UPSCALE_MODEL vae:VAE",
        "",
        "LATENT:LATENT",
    ),
    "LTXVPreprocess": (
        "image:IMAGE",
        "img_compression:INT",
        "output_image:IMAGE",
    ),
    "LTXVSeparateAVLatent": (
        "av_latent:LATENT",
        "",
        "video_latent:LATENT audio_latent:LATENT",
    ),
    "LatentUpscaleModelLoader": (
        "",
        "model_name:COMBO",
        "LATENT_UPSCALE_MODEL:LATENT_UPSCALE_MODEL",
    ),
    "LoadImage": ("", "image:COMBO", "IMAGE:IMAGE MASK:MASK"),
    "LoadImageMask": ("", "image:COMBO channel:COMBO", "MASK:MASK"),
    "LoadVideo": ("", "file:COMBO", "VIDEO:VIDEO"),
    "LoraLoader": (
        "model:MODEL clip:CLIP",
        "lora_name:COMBO strength_model:FLOAT strength_clip:FLOAT",
        "MODEL:MODEL CLIP:CLIP",
    ),
    "LoraLoaderModelOnly": ("model:MODEL", "lora_name:COMBO strength_model:FLOAT", "MODEL:MODEL"),
    "ManualSigmas": (
        "",
        "sigmas:STRING",
        "SIGMAS:SIGMAS",
    ),
    "MarkdownNote": ("", "", ""),
    "MiniMaxH3ImageToVideo": (
        "clip:CLIP vae:VAE first_frame:IMAGE? last_frame:IMAGE?",
        "prompt:STRING width:INT height:INT length:INT",
        "positive:CONDITIONING LATENT:LATENT",
    ),
    "ModelSamplingSD3": ("model:MODEL", "shift:FLOAT", "MODEL:MODEL"),
    "PreviewImage": ("images:IMAGE", "", "images:IMAGE"),
    "RandomNoise": ("", "noise_seed:INT", "NOISE:NOISE"),
    "SamplerCustomAdvanced": (
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        "",
        "output:LATENT denoised_output:LATENT",
    ),
    "SaveVideo": ("video:VIDEO", "filename_prefix:STRING format:COMBO codec:COMBO", "video:VIDEO"),
    "TrimVideoLatent": (
        "samples:LATENT",
        "trim_amount:INT",
        "LATENT:LATENT",
    ),
    "UNETLoader": ("", "unet_name:COMBO weight_dtype:COMBO", "MODEL:MODEL"),
    "VAEDecode": ("samples:LATENT vae:VAE", "", "IMAGE:IMAGE"),
    "VAEDecodeAudio": (
        "samples:LATENT vae:VAE",
        "",
        "AUDIO:AUDIO",
    ),
    "VAEDecodeTiled": (
        "samples:LATENT vae:VAE",
        "tile_size:INT overlap:INT temporal_size:INT temporal_overlap:INT",
        "IMAGE:IMAGE",
    ),
    "VOIDInpaintConditioning": (
        "positive:CONDITIONING negative:CONDITIONING vae:VAE video:IMAGE quadmask:MASK",
        "width:INT height:INT length:INT batch_size:INT",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT",
    ),
    "VOIDQuadmaskPreprocess": ("mask:MASK", "dilate_width:INT", "quadmask:MASK"),
    "VOIDSampler": ("", "", "SAMPLER:SAMPLER"),
    "VAELoader": ("", "vae_name:COMBO", "VAE:VAE"),
    "Wan22ImageToVideoLatent": (
        "vae:VAE start_image:IMAGE?",
        "width:INT height:INT length:INT batch_size:INT",
        "LATENT:LATENT",
    ),
    "WanContextWindowsManual": (
        "model:MODEL",
        "context_length:INT context_overlap:INT context_schedule:COMBO context_stride:INT "
        "closed_loop:BOOLEAN fuse_method:COMBO freenoise:BOOLEAN retain_first_frame:BOOLEAN "
        "split_conds_to_windows:BOOLEAN",
        "MODEL:MODEL",
    ),
    "WanImageToVideo": (
        "positive:CONDITIONING negative:CONDITIONING vae:VAE "
        "clip_vision_output:CLIP_VISION_OUTPUT? start_image:IMAGE?",
        "width:INT height:INT length:INT batch_size:INT",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT",
    ),
    "WanVaceToVideo": (
        "positive:CONDITIONING negative:CONDITIONING vae:VAE "
        "control_video:IMAGE? control_masks:MASK? reference_image:IMAGE?",
        "width:INT height:INT length:INT batch_size:INT strength:FLOAT",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT trim_latent:INT",
    ),
}
